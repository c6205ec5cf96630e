"""The user's own tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.config.models import CustomTask
from bigbatch.custom import load_target, told
from bigbatch.spec import Spec

from .base import Task

KEY = "task.target"
ASKED = ("sums", "metric_names", "weight_is_count", "build_model", "loss", "evaluate", "metrics")


def custom_task(config: CustomTask, spec: Spec) -> CheckedTask:
    """``target(spec, **options)``. Raises ValueError if it may not run, fails, or lacks some of `Task`."""
    make = load_target(config.target, key=KEY)
    with told(KEY, config.target, f"the call with {spec} and task.options = {config.options!r}"):
        task = make(spec, **config.options)
    if missing := [name for name in ASKED if not hasattr(task, name)]:
        raise ValueError(
            f"{KEY} = {config.target!r}: gives a {type(task).__name__} without {', '.join(missing)}; "
            "see bigbatch.tasks.Task, or inherit from bigbatch.tasks.BaseTask"
        )
    return CheckedTask(task, config.target)


class CheckedTask:
    """A task of the user's, whose every answer is looked at. Raises ValueError that names it."""

    def __init__(self, task: Task, target: str) -> None:
        self.task, self.target = task, target
        self.sums, self.metric_names = tuple(task.sums), tuple(task.metric_names)
        self.weight_is_count = bool(task.weight_is_count)
        self._check("loss" in self.metric_names, f"metric_names are {self.metric_names}; one must be loss")

    def build_model(self) -> nn.Module:
        with told(KEY, self.target, "build_model()"):
            model = self.task.build_model()
        self._check(isinstance(model, nn.Module), f"build_model() gives {model!r:.80}; return a torch.nn.Module")
        return model

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        pair = self._call("loss", model, batch)
        good = isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_sum, pair))
        self._check(good, f"loss() gives {pair!r:.80}; return two 0-dim tensors: Σ loss and Σ weight of the batch")
        return pair  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            sums = self._call("evaluate", model, batch)
        good = isinstance(sums, dict) and sums.keys() == {*self.sums} and all(map(_is_sum, sums.values()))
        self._check(good, f"evaluate() gives {sums!r:.80}; return a 0-dim tensor for each of sums = {self.sums}")
        return {name: value.double() for name, value in sums.items()}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        found = self._call("metrics", sums)
        good = isinstance(found, dict) and found.keys() == {*self.metric_names}
        self._check(good, f"metrics() gives {found!r:.80}; return a number for each of {self.metric_names}")
        return {name: float(value) for name, value in found.items()}

    def _call(self, method: str, *args: Any) -> Any:
        # torch's errors are those of processes that are gone and of memory too, and each is answered otherwise.
        with told(KEY, self.target, f"{method}()", passing=RuntimeError):
            return getattr(self.task, method)(*args)

    def _check(self, good: bool, found: str) -> None:
        if not good:
            raise ValueError(f"{KEY} = {self.target!r}: {found}")


def _is_sum(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0
