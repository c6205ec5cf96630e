"""LARS as a textbook loop in the paper's letters, one tensor and one step at a time."""

from __future__ import annotations

from torch import Tensor


def lars(
    weights: list[Tensor], gradients: list[list[Tensor]], rates: list[float], *, momentum=0.9, weight_decay=0.0,
    nesterov=False, trust_coefficient=0.001, eps=0.0, lr_placement="inside", momentum_correction=False,
    denominator="sum", clip_ratio=False, adapt=True, maximize=False,
) -> list[Tensor]:  # fmt: skip
    m, beta, eta = momentum, weight_decay, trust_coefficient
    result = []
    for i, w in enumerate(weights):
        w, v, previous = w.clone(), 0 * w, rates[0]
        for gamma, gradient in zip(rates, gradients, strict=True):
            g = -gradient[i] if maximize else gradient[i]
            w_norm, g_norm = w.square().sum().sqrt().item(), g.square().sum().sqrt().item()
            joint = (g + beta * w).square().sum().sqrt().item()
            below = (joint if denominator == "joint" else g_norm + beta * w_norm) + eps
            local = 1.0
            if adapt and w_norm > 0 and g_norm > 0 and below > 0:
                local = eta * w_norm / below
                if clip_ratio:
                    local = min(local, gamma) / gamma
            if lr_placement == "inside":
                factor = gamma / previous if momentum_correction else 1.0
                step = gamma * local * (g + beta * w)
                v = m * factor * v + step
                w = w - (step + m * v if nesterov else v)
            else:
                step = local * (g + beta * w)
                v = m * v + step
                w = w - gamma * (step + m * v if nesterov else v)
            previous = gamma
        result.append(w)
    return result
