"""LAMB as a textbook loop in the paper's letters, one tensor and one step at a time."""

from __future__ import annotations

from torch import Tensor


def lamb(
    weights: list[Tensor], gradients: list[list[Tensor]], rates: list[float], *, betas=(0.9, 0.999), eps=1e-6,
    weight_decay=0.0, bias_correction=True, clamp_weight_norm=None, prenormalize=False, adapt=True, maximize=False,
) -> list[Tensor]:  # fmt: skip
    b1, b2 = betas
    result = []
    for i, w in enumerate(weights):
        w, m, v = w.clone(), 0 * w, 0 * w
        for t, (gamma, gradient) in enumerate(zip(rates, gradients, strict=True), start=1):
            g = -gradient[i] if maximize else gradient[i]
            whole = sum(x.square().sum().item() for x in gradient) ** 0.5
            if prenormalize and whole > 0:
                g = g / whole
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            m_hat = m / (1 - b1**t) if bias_correction else m
            v_hat = v / (1 - b2**t) if bias_correction else v
            u = m_hat / (v_hat.sqrt() + eps) + weight_decay * w
            w_norm, u_norm = w.square().sum().sqrt().item(), u.square().sum().sqrt().item()
            ratio = 1.0
            if adapt and w_norm > 0 and u_norm > 0:
                ratio = (w_norm if clamp_weight_norm is None else min(w_norm, clamp_weight_norm)) / u_norm
            w = w - gamma * ratio * u
        result.append(w)
    return result
