"""How parameters, gradients and optimiser state lie over the processes: what a step asks of it, and plain replicas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

Build = Callable[[nn.Module], Optimizer]
State = dict[str, Any]


class Strategy(ABC):
    """Owns the model and the optimiser of a run from their assembly on.

    ``wrapped`` is what is called in training. The exchange divides the sum of the gradients over processes by
    ``divides_by``.
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer
    divides_by: int = 1

    @abstractmethod
    def exchange(self, *, when: bool) -> AbstractContextManager[Any]:
        """Gradients of forward and backward passes inside are summed over processes only ``when`` true."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, 0-dim."""
        loss.backward()  # type: ignore[no-untyped-call]

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget all gradients: a step begins, or is skipped."""

    @abstractmethod
    def held(self) -> list[tuple[Tensor, Tensor]]:
        """This process's part of each weight and of its exchanged gradient, which may be changed in place."""

    def step(self) -> None:
        """Step the optimiser along the exchanged gradients."""
        self.optimizer.step()

    @abstractmethod
    def state(self) -> tuple[State, State]:
        """The state dicts of model and optimiser as one process without a strategy would have them, on rank 0.

        Every process must call this; the others get as much or less.
        """

    @abstractmethod
    def load(self, model: State, optimizer: State) -> None:
        """Take over such state dicts, whole ones, from a run of any strategy and number of processes."""


class Replicas(Strategy):
    """``ddp``: every process holds everything, and gradients are summed by DistributedDataParallel."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, wrap: Callable[[nn.Module], nn.Module]) -> None:
        self.model, self.optimizer, self.wrapped = model, optimizer, wrap(model)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            self.divides_by = self.wrapped.process_group.size()

    def exchange(self, *, when: bool) -> AbstractContextManager[Any]:
        if when or not isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def zero_grad(self) -> None:
        for p in self._parameters:
            p.grad = None

    def held(self) -> list[tuple[Tensor, Tensor]]:
        return [(p.detach(), p.grad) for p in self._parameters if p.grad is not None]

    def state(self) -> tuple[State, State]:
        return self.model.state_dict(), self.optimizer.state_dict()

    def load(self, model: State, optimizer: State) -> None:
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
