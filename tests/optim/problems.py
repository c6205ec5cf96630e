"""Weights, gradients and rates that the optimiser tests share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SHAPES = ((2, 3, 2, 2), (), (0, 3), (3, 2), (2, 2))

torch.set_num_threads(1)


def problem(
    steps: int, *, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0
):
    """Random weights and ``steps`` lists of gradients. The last weight starts at 0, the one before has gradient 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    gradients = [[torch.randn(w.shape, generator=generator, dtype=dtype) for w in weights] for _ in range(steps)]
    if len(weights) > 1:
        weights[-1].zero_()
        for gradient in gradients[::3]:
            gradient[-2].zero_()
    return weights, gradients


def rates(steps: int, peak: float) -> list[float]:
    """A warmup and a cosine, never 0, so that the rate changes at every step."""
    return [peak * min(1.0, (t + 1) / 5) * (1.1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)]


def train(optimizer, params: Sequence[Tensor], gradients, lrs) -> list[Tensor]:
    """Step through the gradients at the given rates (multiplied by a group's lr_scale); returns the parameters."""
    for lr, gradient in zip(lrs, gradients, strict=True):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        for p, g in zip(params, gradient, strict=True):
            p.grad = None if g is None else twin_of(g)
        optimizer.step()
    return list(params)


def parameters(weights: Sequence[Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(twin_of(w)) for w in weights]


def twin_of(t: Tensor) -> Tensor:
    """A copy with the very strides of ``t``; clone() would close its gaps. A DTensor, which has none, is cloned."""
    if hasattr(t, "to_local"):
        return t.detach().clone()
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t.detach())


def shard_like(p, whole: Tensor) -> Tensor:
    """This process's shard of ``whole``, as fully_shard cuts it: along the rows, on the last dimension of p's mesh."""
    mesh, rows = p.device_mesh, whole.chunk(p.device_mesh.size(-1))
    rank = mesh.get_local_rank(mesh.ndim - 1)
    mine = rows[rank] if rank < len(rows) else whole[:0]
    return type(p.data).from_local(
        mine.clone(), mesh, p.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def assert_near(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-6) -> None:
    """‖a − b‖ ≤ tolerance · ‖b‖ over all pairs together: a scalar of its own may come to lie next to 0."""
    a, b = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (ours, theirs))
    assert float((a - b).norm()) <= tolerance * float(b.norm())
