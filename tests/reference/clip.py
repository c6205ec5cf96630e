"""Gradient clipping, one tensor and one unit at a time. Each returns new gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def global_norm(gradients: list[Tensor]) -> Tensor:
    return torch.sqrt(sum((g.square().sum() for g in gradients), torch.zeros((), dtype=torch.float64)))


def by_norm(gradients: list[Tensor], limit: float) -> list[Tensor]:
    norm = global_norm(gradients)
    return [g * limit / (norm + 1e-6) if norm + 1e-6 > limit else g for g in gradients]


def by_value(gradients: list[Tensor], limit: float) -> list[Tensor]:
    return [torch.where(g > limit, limit, torch.where(g < -limit, -limit, g)) for g in gradients]


def adaptive(weights: list[Tensor], gradients: list[Tensor], limit: float, *, eps: float = 1e-3) -> list[Tensor]:
    """Brock et al. 2021, arXiv:2102.06171, equation 3."""

    def clip(w: Tensor, g: Tensor) -> Tensor:
        bound = limit * max(w.square().sum().sqrt().item(), eps)
        norm = g.square().sum().sqrt().item()
        return g * bound / norm if norm > bound else g

    return [
        clip(w, g) if g.dim() <= 1 or not len(g) else torch.stack([clip(a, b) for a, b in zip(w, g, strict=True)])
        for w, g in zip(weights, gradients, strict=True)
    ]
