"""Running statistics: collected by every forward pass, moved once per optimiser step, merged over ranks when read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .batch import SpanBatchNorm
from .kernel import Reduce


class BatchStats:
    """The running statistics of all batch norms of a model but the frozen ones.

    For an optimiser step of N samples over all ranks, with momentum ρ, and n samples in each group of mean μ (or of
    unbiased variance μ):  running ← (1 − ρ)·running + ρ·Σ n·μ / N.  That is linear in the groups, so that each rank
    takes in its own groups alone and `merge` sums over ranks; on one process it is nn.BatchNorm's arithmetic.
    Between merges a rank's buffers are not yet the model's: merge before reading them, and keep
    DistributedDataParallel from broadcasting them. A model without batch norm is fine: nothing is done or exchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, SpanBatchNorm)}
        self._layers = {name: layer for name, layer in layers.items() if not layer.frozen}

    def empty(self, flag: bool) -> None:
        """Whether forward passes from now on carry a dummy sample, which joins collectives and counts for nothing."""
        for layer in self._layers.values():
            layer.empty = flag

    def check(self, samples: int) -> None:
        """ValueError unless every layer saw each of ``samples`` samples of this rank once; forgets them."""
        seen = {name: layer.seen for name, layer in self._layers.items()}
        self.discard()
        wrong = next((name for name, count in seen.items() if count != samples), None)
        if wrong is not None:
            raise ValueError(
                f"norm.kind = batch: here {wrong} sees {seen[wrong]} rows of {samples} samples, and each batch "
                "norm must see each sample once; use norm.kind=group or another model"
            )

    def commit(self, samples: int) -> None:
        """Move the running buffers: an optimiser step of ``samples`` samples over all ranks is done.

        Layers in evaluation mode are left alone. Raises ValueError where the layers saw unequal numbers of samples, or
        more than there were.
        """
        layers = {name: layer for name, layer in self._layers.items() if layer.training}
        if not layers:
            return
        seen = {name: layer.seen for name, layer in layers.items()}
        if len({*seen.values()}) > 1 or any(count > samples for count in seen.values()):
            raise ValueError(
                f"batch norm saw {seen} samples of a step of {samples}: every layer must see every sample once; "
                "use norm.kind=group for a model that skips or repeats layers"
            )
        share = next(iter(seen.values())) / samples
        for momentum in {layer.momentum for layer in layers.values()}:
            _move([layer for layer in layers.values() if layer.momentum == momentum], momentum, share)
        self.discard()

    def discard(self) -> None:
        """Forget what was collected since the last commit, for a step that is skipped."""
        if self._layers:
            torch._foreach_zero_(_buffers(self._layers.values(), "pending_mean", "pending_var"))
        for layer in self._layers.values():
            layer.seen = 0

    def merge(self, reduce: Reduce, rank: int) -> None:
        """Make the running buffers those of the model, the same on all ranks, in one collective.

        ``reduce`` sums a tensor in place over all ranks. Without a commit since the last merge, or since the buffers
        were loaded from a state_dict, nothing is exchanged or changed.
        """
        layers = [layer for layer in self._layers.values() if layer.base is not None]
        if not layers:
            return
        running = shares = _buffers(layers, "running_mean", "running_var")
        if rank != 0:
            # What all ranks had agreed on stands in the buffers of each, and is counted once, on rank 0.
            agreed = [layer.base[i] * layer.decay for i in (0, 1) for layer in layers if layer.base is not None]
            shares = list(torch._foreach_sub(running, agreed))
        flat = torch.cat(shares)
        reduce(flat)
        torch._foreach_copy_(running, list(flat.split_with_sizes([len(buffer) for buffer in running])))
        for layer in layers:
            layer.base = None


def _move(layers: list[SpanBatchNorm], momentum: float, share: float) -> None:
    """running ← (1 − ρ)·running + ρ·pending, of layers whose pending mean is over a share of the samples."""
    for layer in layers:
        if layer.base is None:
            layer.base, layer.decay = torch.stack([layer.running_mean, layer.running_var]), 1.0
        layer.decay *= 1 - momentum
    running = _buffers(layers, "running_mean", "running_var")
    # As a factor a tensor on the CPU is four times as fast as a number there, and the same elsewhere.
    torch._foreach_mul_(running, torch.tensor(1 - momentum, dtype=running[0].dtype))
    torch._foreach_add_(running, _buffers(layers, "pending_mean", "pending_var"), alpha=momentum * share)
    torch._foreach_add_(_buffers(layers, "num_batches_tracked"), 1)


def _buffers(layers: Iterable[SpanBatchNorm], *names: str) -> list[Tensor]:
    """All layers' buffers of these names; past the modules' attribute access, which costs more than the arithmetic."""
    found = [layer._buffers[name] for name in names for layer in layers]
    return [buffer for buffer in found if buffer is not None]
