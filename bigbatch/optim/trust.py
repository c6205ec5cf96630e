"""Layer norms and trust ratios: the only place where the optimisers take norms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]


def norms(tensors: Tensors) -> Tensor:
    """L2 norms of N tensors of one device, shape (N,), in float32 (float64 for float64 tensors); no host sync."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))


def global_norm(buckets: Iterable[Tensors]) -> Tensor:
    """L2 norm over all tensors together, 0-dim; each bucket holds tensors of one device and dtype, none is empty."""
    parts = [torch.linalg.vector_norm(norms(bucket)) for bucket in buckets]
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    whole: Tensor = torch.linalg.vector_norm(torch.stack([part.to(parts[0].device, dtype) for part in parts]))
    return whole


def lars_ratios(
    w: Tensors,
    g: Tensors,
    d: Tensors,
    *,
    weight_decay: float,
    trust_coefficient: float,
    eps: float,
    denominator: Literal["sum", "joint"],
    cap: float | Tensor | None,
) -> Tensor:
    """λ = η‖w‖ / (‖g‖ + β‖w‖ + ε) for each of N weights w, gradients g and decayed gradients d = g + βw; shape (N,).

    ``joint`` divides by ‖d‖ + ε instead. With ``cap`` = γ the ratio is min(λ/γ, 1), so that the layer's rate γ·ratio
    is min(λ, γ). The ratio is 1 where ‖w‖, ‖g‖ or the denominator is 0. Non-finite norms stay visible in the ratio.
    """
    w_norm, g_norm = norms(w), norms(g)
    below = (norms(d) if denominator == "joint" else g_norm + weight_decay * w_norm) + eps
    ratio = trust_coefficient * w_norm / below
    if cap is not None:
        ratio = torch.where(ratio >= cap, 1.0, ratio / cap)
    return torch.where((w_norm == 0) | (g_norm == 0) | (below == 0), 1.0, ratio)


def lamb_ratios(w: Tensors, u: Tensors, *, clamp: float | None) -> Tensor:
    """φ(‖w‖)/‖u‖ for N weights w and updates u, φ(z) = min(z, clamp); 1 where a norm is 0; shape (N,)."""
    w_norm, u_norm = norms(w), norms(u)
    top = w_norm if clamp is None else w_norm.clamp(max=clamp)
    return torch.where((w_norm == 0) | (u_norm == 0), 1.0, top / u_norm)
