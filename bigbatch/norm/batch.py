"""Batch norm whose statistics are taken over a chosen number of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .kernel import Reduce, normalise

if TYPE_CHECKING:
    from typing_extensions import Self

# Below so many values a channel and image, statistics image by image cost more than a loop or a copy.
FEWEST_VALUES = 16


class SpanBatchNorm(_BatchNorm):
    """Batch norm over groups of ``span`` consecutive samples; its state_dict is that of nn.BatchNorm1d/2d/3d.

    Without ``reduce``: ghost batch norm (Hoffer et al. 2017, arXiv:1705.08741, algorithm 1). A batch of n samples is
    k = max(1, n // span) groups; the remainder joins the last. One group is nn.BatchNorm. With ``reduce``: one group,
    the samples of all ranks that it sums over, as many as each has.

    Differs from the paper, and from nn.BatchNorm, in the running statistics: forward only collects the sample-weighted
    mean over groups of μ and of the unbiased σ², and `BatchStats` moves the running buffers once per optimiser step.
    Every sample must pass once per forward pass, as the first dimension of x.

    x is (n, C, L...) in float32, float64, or bf16 or fp16 beside float32 parameters; its memory format is kept.
    Raises ValueError for a ``momentum`` of None, or groups of one value.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    pending_mean: Tensor
    pending_var: Tensor
    momentum: float

    def __init__(
        self,
        num_features: int,
        *,
        span: int,
        reduce: Reduce | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
    ) -> None:
        if momentum is None:
            raise ValueError("momentum = None: the cumulative average is not supported; give a number such as 0.1")
        super().__init__(num_features, eps, momentum, affine)
        self.span, self.reduce = span, reduce
        self.empty = False
        self.frozen = False
        # The mean over the `seen` samples since the last commit; not part of the state, like a gradient.
        self.seen = 0
        self.register_buffer("pending_mean", torch.zeros_like(self.running_mean), persistent=False)
        self.register_buffer("pending_var", torch.zeros_like(self.running_var), persistent=False)
        # The running mean and variance that all ranks last agreed on, None if they still do, and the share of those
        # that is still in the running buffers.
        self.base: Tensor | None = None
        self.decay = 1.0

    def train(self, mode: bool = True) -> Self:
        """Training mode, which a ``frozen`` layer does not enter: it keeps its running statistics and uses them."""
        return super().train(mode and not self.frozen)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise ValueError(f"batch norm of shape {tuple(x.shape)}: give (samples, channels, ...)")
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.empty:
            return self._empty(x)
        if self.reduce is not None:
            return self._groups(x, rows=1, samples=len(x))
        return self._ghosts(x)

    def _ghosts(self, x: Tensor) -> Tensor:
        """The groups of this rank's samples, by the cheapest way that the memory format allows."""
        samples, span = len(x), self.span
        groups = max(1, samples // span)
        values = x[0, 0].numel()
        if span * values == 1:
            raise ValueError(
                f"norm.span = 1: no statistics of one value a channel in {tuple(x.shape)}; use 2 or more (a larger "
                "micro batch, where the span follows it)"
            )
        if samples * values == 1:
            return self._groups(x, rows=1, samples=1)  # a lone last sample is its own mean; torch's kernel refuses it
        if groups == 1:
            # Views with version counters of their own: backward does not read these buffers, which others change.
            mean, var = self.pending_mean.data, self.pending_var.data
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, self._share(samples), self.eps)
        in_place = x.is_contiguous() and values >= FEWEST_VALUES
        last = samples - (groups - 1) * span
        if x.is_cpu and not in_place:
            return torch.cat([self._ghosts(part) for part in x.split_with_sizes([span] * (groups - 1) + [last])])
        if last > span:
            return torch.cat([self._ghosts(part) for part in x.split_with_sizes([samples - last, last])])
        if in_place:
            return self._groups(x.view(1, samples * x.shape[1], -1), rows=span, samples=samples).view_as(x)
        return self._ghosts_by_copy(x, groups=groups)

    def _ghosts_by_copy(self, x: Tensor, *, groups: int) -> Tensor:
        """Equal groups of any memory format, each brought together as one image of (C, span·L) values."""
        inside = x.movedim(1, -1)
        images = inside.reshape(groups, -1, x.shape[1]).transpose(1, 2).contiguous()
        y = self._groups(images.view(1, groups * x.shape[1], -1), rows=1, samples=len(x))
        return y.view_as(images).transpose(1, 2).reshape(inside.shape).movedim(-1, 1)

    def _groups(self, x: Tensor, *, rows: int, samples: int) -> Tensor:
        weight = torch.ones_like(self.running_mean) if self.weight is None else self.weight
        bias = torch.zeros_like(self.running_mean) if self.bias is None else self.bias
        y, mean, var = normalise(x, weight, bias, eps=self.eps, rows=rows, reduce=self.reduce, empty=self.empty)
        share = self._share(samples)
        self.pending_mean.lerp_(mean.mean(0).to(self.pending_mean.dtype), share)
        self.pending_var.lerp_(var.mean(0).to(self.pending_var.dtype), share)
        return y

    def _empty(self, x: Tensor) -> Tensor:
        """Zeros whose gradients are zeros, after the same collectives as the other ranks."""
        if self.reduce is not None:
            return self._groups(x * 0, rows=1, samples=0) * 0
        mean, var = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
        return F.batch_norm(x * 0, mean, var, self.weight, self.bias, eps=self.eps) * 0

    def _share(self, samples: int) -> float:
        """Count the samples; their share in the pending mean."""
        self.seen += samples
        return samples / self.seen if samples else 0.0

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.base = None

    def extra_repr(self) -> str:
        where = "" if self.reduce is None else " over neighbouring ranks"
        return f"{super().extra_repr()}, span={self.span}{where}"  # type: ignore[no-untyped-call]


class ThenActivation(nn.Module):
    """Mixin before a norm: its ``drop`` and ``act`` follow it, as in timm's BatchNormAct2d."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


class SpanBatchNormAct(ThenActivation, SpanBatchNorm):
    """SpanBatchNorm, drop, activation."""


class GroupNormAct(ThenActivation, nn.GroupNorm):
    """GroupNorm, drop, activation."""
