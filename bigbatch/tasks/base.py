"""What training asks of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


class Task(Protocol):
    """Builds a model and judges it. A task knows nothing of processes, steps or devices.

    Losses and metrics are sums with their weight and never means, so that they add up over any split of a batch.
    """

    @property
    def sums(self) -> tuple[str, ...]:
        """Names of the sums that ``evaluate`` gives."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics that ``metrics`` gives."""

    @property
    def weight_is_count(self) -> bool:
        """Whether a batch's weight is its number of samples, known without looking at it."""

    def build_model(self) -> nn.Module:
        """A new model, on the CPU, initialised from torch's global generator. Raises ValueError for a wrong recipe."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Σ loss and Σ weight over the batch, 0-dim, in float32 (float64 for float64 inputs)."""

    def evaluate(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the batch, float64, 0-dim, without gradient, under the names of ``sums``."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics from the sums of ``evaluate``, added up over all batches."""


@runtime_checkable
class Pretrained(Protocol):
    """A task whose model's name stands for weights too."""

    def pretrained(self) -> dict[str, Tensor]:
        """Those weights by the model's names, of a last layer as it was trained. Raises ValueError without them."""


class BaseTask(ABC):
    """A task whose only metric is its mean loss, and whose samples weigh 1; override what is otherwise."""

    sums: tuple[str, ...] = ("loss", "weight")
    metric_names: tuple[str, ...] = ("loss",)
    weight_is_count: bool = True

    @abstractmethod
    def build_model(self) -> nn.Module: ...

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]: ...

    def evaluate(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss, weight = self.loss(model, batch)
        return {"loss": loss.double(), "weight": weight.double()}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["weight"]}
