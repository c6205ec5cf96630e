"""Batch normalisation of many groups at once, or of one group that several ranks hold, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Reduce = Callable[[Tensor], None]
"""Sums a tensor in place over a block of neighbouring ranks."""


def normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    rows: int = 1,
    reduce: Reduce | None = None,
    empty: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = γ·x̂ + β with x̂ = (x − μ)/√(σ² + ε), μ and σ² over each group of x (Ioffe & Szegedy 2015, arXiv:1502.03167).

    x is (B, R·C, L...) with γ and β of C channels: R rows of channels that ``rows`` by ``rows`` share μ and σ². A
    contiguous batch of n images seen as (1, n·C, H·W) thus becomes groups of ``rows`` images without a copy. With
    ``reduce`` the one group is that of all ranks of the block, in which an ``empty`` rank counts for nothing.

    Returns y like x, and per group μ and the unbiased σ² as (R/rows, C), at least float32, without gradient.
    One collective in forward and one in backward.
    """
    y, mean, var = _Normalise.apply(x, weight, bias, eps, rows, reduce, empty)
    return y, mean, var


class _Normalise(torch.autograd.Function):
    """dx = γ/√(σ² + ε) · (dy − mean(dy) − x̂·mean(dy·x̂)), dγ = Σ dy·x̂, dβ = Σ dy; means over the group, Σ over x.

    Made of torch's own batch-norm kernels: they are fused, keep the memory format and take bf16 beside float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        rows: int,
        reduce: Reduce | None,
        empty: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _statistics(x, channels=weight.numel(), rows=rows)
        values = 0 if empty else x.numel() // x.shape[1] * rows
        count: float | Tensor = values
        if reduce is not None:
            mean, var, count = _exchange(mean, var, count=values, reduce=reduce)
        freedom = (count - 1).clamp(min=1) if isinstance(count, Tensor) else max(count - 1, 1)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.rows, ctx.reduce, ctx.count = eps, rows, reduce, count
        unbiased = var * (count / freedom)
        ctx.mark_non_differentiable(mean, unbiased)
        return _affine(x, mean, var, weight, bias, rows=rows, eps=eps), mean, unbiased

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        if dy.stride() != x.stride():
            # The kernels take twice as long where the two are laid out unlike each other.
            dy = torch.empty_like(x).copy_(dy)
        # In evaluation mode this kernel takes Σ dy·x̂ and Σ dy in one pass, and nothing else.
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, None, *_spread(mean, var, rows=ctx.rows), None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack([dweight, dbias]).view(2, -1, ctx.rows, weight.numel()).sum(2)
        dweight, dbias = sums.sum(1).to(weight.dtype)
        dx = None
        if ctx.reduce is not None:
            ctx.reduce(sums)
        if ctx.needs_input_grad[0]:
            scale = weight * torch.rsqrt(var + ctx.eps)
            slope, shift = sums.mul_(-scale / ctx.count)
            dx = _affine(x, mean, var, slope, shift, rows=ctx.rows, eps=ctx.eps)
            dx.addcmul_(dy, _spread(scale, rows=ctx.rows)[0].view(-1, *[1] * (x.dim() - 2)))
        return dx, dweight, dbias, None, None, None, None


def _statistics(x: Tensor, *, channels: int, rows: int) -> tuple[Tensor, Tensor]:
    """μ and biased σ² of each group, (groups, channels): those of the rows, merged as Chan et al. 1979 do."""
    # The kernel computes in the dtype of the running buffers it is given, which keeps bf16 statistics in float32.
    unused = torch.zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    mean, var = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
    mean, var = mean.view(-1, rows, channels), var.view(-1, rows, channels)
    if rows == 1:
        return mean.squeeze(1), var.squeeze(1)
    return mean.mean(1), var.mean(1) + mean.var(1, correction=0)


def _exchange(mean: Tensor, var: Tensor, *, count: float, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """μ, biased σ² and the count of the group whose parts the ranks hold, in one collective.

    Sums N, N·μ and N·(σ² + μ²), in float64: subtracting μ² then loses (μ/σ)²·1e-16 of σ², less than float32 data of
    that μ/σ have lost already.
    """
    first = mean.double()
    sums = torch.cat([first, var.double() + first.square(), first.new_ones(1, 1)], dim=1).mul_(count)
    reduce(sums)
    # A group of empty ranks alone has no samples.
    total = sums[0, -1].clamp(min=1)
    first, second = (sums[:, :-1] / total).chunk(2, dim=1)
    second = (second - first.square()).clamp(min=0)
    return first.to(mean.dtype), second.to(mean.dtype), total.to(mean.dtype)


def _affine(x: Tensor, mean: Tensor, var: Tensor, slope: Tensor, shift: Tensor, *, rows: int, eps: float) -> Tensor:
    """slope·x̂ + shift in one pass."""
    slope, shift = (t.to(mean.dtype).expand_as(mean) for t in (slope, shift))
    mean, var, slope, shift = _spread(mean, var, slope, shift, rows=rows)
    return F.batch_norm(x, mean, var, slope, shift, training=False, eps=eps)


def _spread(*values: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Values of the groups, (groups, channels) each, for every row of channels: (groups·rows·channels,) each."""
    return torch.stack(values).unsqueeze(2).expand(-1, -1, rows, -1).flatten(1).unbind()
