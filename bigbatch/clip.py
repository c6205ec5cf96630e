"""Gradient clipping: by global norm, by value, or per unit relative to the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

# ε of adaptive clipping, which lets units whose weights start at zero move.
EPS = 1e-3
# Elements that one norm is taken over.
SUM = 2**18


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
    return clip_held([(p, p.grad) for p in parameters if p.grad is not None], kind=kind, max=max)


def clip_held(
    held: Sequence[tuple[Tensor, Tensor]],
    *,
    kind: Kind,
    max: float | None,
    sum_parts: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """`clip_gradients` of pairs of a weight and its gradient.

    Of gradients that lie on several processes each gives its parts, whole units but for vectors, and as many pairs as
    the others, some of them empty. ``sum_parts`` then sums a tensor in place over them, once for everything.
    """
    if (max is None) != (kind == "none"):
        way_out = "give a number above 0" if max is None else "remove it or choose another clip.kind"
        raise ValueError(f"clip.max = {max}: with clip.kind {kind}; {way_out}")
    gradients = [gradient for _, gradient in held]
    units = (
        [(_unit_norms(weight.detach()), _unit_norms(gradient)) for weight, gradient in held]
        if kind == "adaptive"
        else []
    )
    groups: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, gradient in enumerate(gradients):
        groups[gradient.device, gradient.dtype].append(place)
    norm = _global_norm([[gradients[i] for i in places] for places in groups.values()])
    if sum_parts:
        vectors = (n for gradient, pair in zip(gradients, units, strict=False) if gradient.dim() < 2 for n in pair)
        _make_whole([norm, *vectors], sum_parts)
    if max is None:
        return norm
    for places in groups.values():
        group = [gradients[i] for i in places]
        if kind == "norm":
            # A value on the CPU can be read at once; elsewhere it costs less to multiply by 1 than to wait.
            if norm.device.type == "cpu" and not norm + 1e-6 > max:
                continue
            scale = (max / (norm + 1e-6)).clamp(max=1)
            scale = torch.where(norm.isfinite(), scale, 1)
            torch._foreach_mul_(group, scale.to(group[0].device))
        elif kind == "value":
            torch._foreach_clamp_min_(group, -max)
            torch._foreach_clamp_max_(group, max)
        else:
            torch._foreach_mul_(group, _unit_scales(group, [units[i] for i in places], norm.isfinite(), limit=max))
    return norm


def _global_norm(groups: list[list[Tensor]]) -> Tensor:
    if not groups:
        return torch.zeros(())
    groups = [[piece for gradient in group for piece in _pieces(gradient)] for group in groups]
    norms = [torch.stack(torch._foreach_norm(g, 2, torch.promote_types(g[0].dtype, torch.float32))) for g in groups]
    dtype = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
    every = norms[0] if len(norms) == 1 else torch.cat([n.to(norms[0].device, dtype) for n in norms])
    norm: Tensor = torch.linalg.vector_norm(every)
    return norm


def _pieces(gradient: Tensor) -> Sequence[Tensor]:
    """On the CPU, where a float32 norm over 2²⁴ elements is off by 1e-3, parts that keep their digits."""
    if gradient.device.type != "cpu" or gradient.numel() <= SUM:
        return [gradient]
    if gradient.is_contiguous():
        return torch.split(gradient.view(-1), SUM)
    return torch.split(gradient, max(1, SUM * len(gradient) // gradient.numel()))


def _make_whole(norms: list[Tensor], sum_parts: Callable[[Tensor], None]) -> None:
    """Norms of parts become norms of what they are parts of, in place; each of one value."""
    squares = torch.stack([norm.to(norms[0].device, torch.float64).view(()) for norm in norms]).square_()
    sum_parts(squares)
    for norm, whole in zip(norms, squares.sqrt_(), strict=True):
        norm.copy_(whole)


def _unit_scales(
    gradients: list[Tensor], units: list[tuple[Tensor, Tensor]], finite: Tensor, *, limit: float
) -> list[Tensor]:
    """For each gradient what its units, of these weight and gradient norms, are to be multiplied by, in a shape that
    broadcasts; all units in one go."""
    norms = [norm for _, norm in units]
    bound = torch.cat([weight for weight, _ in units]).clamp_(min=EPS).mul_(limit)
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
