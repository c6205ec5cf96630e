"""Gradient clipping: by global norm, by value, or per unit relative to the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

# ε of adaptive clipping, which lets units whose weights start at zero move.
EPS = 1e-3


Kind = Literal["none", "norm", "value", "adaptive"]


def clip_gradients(parameters: Iterable[nn.Parameter], *, kind: Kind, max: float | None) -> Tensor:
    """Clip the gradients of ``parameters`` in place; returns their global L2 norm ‖g‖ from before.

    none: nothing. norm: g ← g · min(1, max/(‖g‖ + 1e-6)), as torch.nn.utils.clip_grad_norm_. value: every entry into
    [−max, max]. adaptive (Brock et al. 2021, arXiv:2102.06171, section 4.1): for each unit i,
    g_i ← g_i · min(1, λ · max(‖w_i‖, ε)/‖g_i‖) with λ = max and ε = 1e-3. A unit is what one index of the first
    dimension holds, a row of a linear and a filter of a convolutional layer; a vector or scalar (bias, γ) is one
    unit. Differs from the paper: the final linear layer is clipped too, since nothing tells it apart.

    ‖g‖ is a 0-dim tensor on the first gradient's device, float64 if any gradient is and else float32; nothing here
    waits for the device. Where ‖g‖ is not finite, norm and adaptive leave the gradients as they are.
    Raises ValueError for a ``max`` that is missing, or given to kind none.
    """
    return clip_held([(p.detach(), p.grad) for p in parameters if p.grad is not None], kind=kind, max=max)


def clip_held(held: Sequence[tuple[Tensor, Tensor]], *, kind: Kind, max: float | None) -> Tensor:
    """`clip_gradients` of pairs of a weight and its gradient."""
    if (max is None) != (kind == "none"):
        way_out = "give a number above 0" if max is None else "remove it or choose another clip.kind"
        raise ValueError(f"clip.max = {max}: with clip.kind {kind}; {way_out}")
    groups: defaultdict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for weight, gradient in held:
        groups[gradient.device, gradient.dtype].append((weight, gradient))
    norm = _global_norm([[gradient for _, gradient in group] for group in groups.values()])
    if max is None:
        return norm
    for group in groups.values():
        gradients = [gradient for _, gradient in group]
        if kind == "norm":
            scale = (max / (norm + 1e-6)).clamp(max=1)
            scale = torch.where(norm.isfinite(), scale, 1)
            torch._foreach_mul_(gradients, scale.to(gradients[0].device))
        elif kind == "value":
            torch._foreach_clamp_min_(gradients, -max)
            torch._foreach_clamp_max_(gradients, max)
        else:
            torch._foreach_mul_(
                gradients, _unit_scales([weight for weight, _ in group], gradients, norm.isfinite(), limit=max)
            )
    return norm


def _global_norm(groups: list[list[Tensor]]) -> Tensor:
    if not groups:
        return torch.zeros(())
    norms = [torch.stack(torch._foreach_norm(g, 2, torch.promote_types(g[0].dtype, torch.float32))) for g in groups]
    dtype = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
    norm: Tensor = torch.linalg.vector_norm(torch.cat([n.to(norms[0].device, dtype) for n in norms]))
    return norm


def _unit_scales(weights: list[Tensor], gradients: list[Tensor], finite: Tensor, *, limit: float) -> list[Tensor]:
    """For each gradient what its units are to be multiplied by, in a shape that broadcasts; all units in one go."""
    norms = [_unit_norms(g) for g in gradients]
    bound = torch.cat([_unit_norms(weight) for weight in weights]).clamp_(min=EPS).mul_(limit)
    scale = torch.where(finite.to(bound.device), bound / torch.maximum(torch.cat(norms), bound), 1)
    parts = scale.split_with_sizes([len(n) for n in norms])
    return [
        part.view(-1, *[1] * (g.dim() - 1)) if g.dim() > 1 else part[0]
        for part, g in zip(parts, gradients, strict=True)
    ]


def _unit_norms(tensor: Tensor) -> Tensor:
    """L2 norms of a tensor's units, (units,)."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    inside = tuple(range(1, tensor.dim())) or None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=inside, dtype=dtype)
    return norms.view(-1)
