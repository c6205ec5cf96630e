"""How parameters, gradients and optimiser state lie over the processes: what a step asks of it, and plain replicas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.optim import Optimizer

from bigbatch.config.models import Parallel

from .compress import Probe, exchange_with

Build = Callable[[nn.Module], Optimizer]
Reduce = Callable[[Tensor], None]
State = dict[str, Any]

KERNEL = ("foreach", "fused", "kernel")
"""What in a parameter group says how it is computed, not what: this process's business, not the checkpoint's."""


class Strategy(ABC):
    """Owns the model and the optimiser of a run from their assembly on.

    ``wrapped`` is what is called in training. The exchange divides the sum of the gradients over processes by
    ``divides_by``, and where it ``carries``, it sums what `backward` is given besides. ``sum_parts`` sums a tensor in
    place over the processes that hold parts of one gradient; None where each holds gradients whole. In ``lockstep``
    every forward pass is a collective, those of an evaluation too. Where it ``fills_gaps``, a parameter that no loss
    reaches has a gradient of zeros.
    """

    wrapped: nn.Module
    divides_by: int = 1
    carries: bool = False
    sum_parts: Reduce | None = None
    lockstep: bool = False
    fills_gaps: bool = False

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    @abstractmethod
    def exchange(self, *, when: bool) -> AbstractContextManager[Any]:
        """Gradients of forward and backward passes inside are summed over processes only ``when`` true."""

    def start(self, probes: Sequence[Probe] = ()) -> None:
        """Training begins: the model has been tried, compression may set in, and probes may look; see `exchange_with`.

        ValueError for probes where gradients do not pass them.
        """
        if probes:
            raise ValueError(
                f"probes = {len(probes)}: only DistributedDataParallel shows them gradients; use ddp or zero1"
            )

    def backward(self, loss: Tensor, factor: float = 1.0, totals: Tensor | None = None) -> None:
        """Add the gradient of ``factor`` times ``loss``, 0-dim.

        Where the strategy ``carries`` and gradients are exchanged, ``totals``, of shape (3,), become their sums over
        all processes, rounded to the parameters' dtype.
        """
        torch.autograd.backward(loss, torch.full_like(loss, factor))

    def skip(self) -> None:
        """Forget the gradients of a step in which they are not finite, and all that came of them."""
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self._parameters:
            p.grad = None

    def held(self) -> list[tuple[Tensor, Tensor]]:
        """This process's part of each weight and of its exchanged gradient, which may be changed in place."""
        return [(p, p.grad) for p in self._parameters if p.grad is not None]

    def step(self) -> None:
        """Step the optimiser along the exchanged gradients."""
        self.optimizer.step()

    def model_state(self) -> State:
        """The model's state dict as one process without a strategy would have it, on rank 0.

        Every process must call this, and `optimizer_state`; the others get as much or less.
        """
        return self.model.state_dict()

    def optimizer_state(self) -> State:
        """The optimiser's state dict likewise."""
        return self.optimizer.state_dict()

    def load(self, model: State, optimizer: State) -> None:
        """Take over such state dicts, whole on every process, from a run of any strategy and number of processes."""
        groups = [
            {**theirs, **{key: ours[key] for key in KERNEL if key in ours}}
            for theirs, ours in zip(optimizer["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.load_model(model)
        self.optimizer.load_state_dict({**optimizer, "param_groups": groups})

    def load_model(self, model: State, *, strict: bool = True) -> None:
        """Take over the model's state dict alone; not ``strict``: or part of one."""
        self.model.load_state_dict(model, strict=strict)


class Replicas(Strategy):
    """``ddp``: every process holds everything, and gradients are summed by DistributedDataParallel.

    It rearranges its buckets once, in the forward pass after the first backward pass, and sums depend on where a bucket
    is cut. So a first pass before training pins them: then a resumed run's sums are those of one that never stopped.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, wrap: Callable[[nn.Module], nn.Module], parallel: Parallel
    ) -> None:
        super().__init__(model, optimizer)
        self._carrier, self._parallel = _Carrier(model), parallel
        self.wrapped = wrap(self._carrier)
        self._ddp = self.wrapped if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) else None
        self._memory: PowerSGDState | None = None
        if self._ddp:
            self.divides_by = self._ddp.process_group.size()
            self.carries = parallel.compression == "none"

    def start(self, probes: Sequence[Probe] = ()) -> None:
        if self._ddp and (probes or not self.carries):
            self._memory = exchange_with(self._ddp, self._parallel, probes)
            self.carries = False

    def skip(self) -> None:
        super().skip()
        if self._memory:
            for memory in (self._memory.error_dict, self._memory.p_memory_dict, self._memory.q_memory_dict):
                memory.clear()

    def backward(self, loss: Tensor, factor: float = 1.0, totals: Tensor | None = None) -> None:
        if not self._ddp or not self._ddp.require_backward_grad_sync:
            super().backward(loss, factor)
            return
        # What is compressed would no longer be a sum, and probes are to see nothing but gradients.
        sums = self._carrier.sums
        sums.grad = None
        cargo = totals.to(sums.dtype) if self.carries and totals is not None else torch.zeros_like(sums)
        torch.autograd.backward((loss, sums), (torch.full_like(loss, factor), cargo))
        if self.carries and totals is not None and sums.grad is not None:
            totals.copy_(sums.grad).mul_(self.divides_by)

    def exchange(self, *, when: bool) -> AbstractContextManager[Any]:
        return nullcontext() if when or not self._ddp else self._ddp.no_sync()


def make_plain(model: nn.Module, *, strategy: str) -> None:
    """Lay parameters out for being cut: row by row, whatever their memory format. ValueError for a scalar."""
    for name, p in model.named_parameters():
        if p.dim() == 0:
            raise ValueError(
                f"parallel.strategy = {strategy}: {name} is a scalar, which cannot be cut; use ddp or zero1"
            )
        p.data = p.data.contiguous()


class _Carrier(nn.Module):
    """A model with three numbers more, whose "gradients" travel in the buckets of the others: no collective of their
    own tells the processes the loss and the weight of all, and whether one is to stop."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sums = nn.Parameter(next(p for p in model.parameters() if p.requires_grad).new_zeros(3))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
