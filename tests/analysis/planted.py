"""Workers of verify, each with a fault that trainers are known to have."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bigbatch.analysis import Trace, replay
from bigbatch.analysis.replay import Role
from bigbatch.config import RunConfig
from bigbatch.dist.strategy import Replicas
from bigbatch.norm import BatchStats
from bigbatch.plan import Plan
from bigbatch.tasks import ClassificationTask
from bigbatch.train import Parts, assemble


def mean_of_means(rank: int, config: RunConfig, plan: Plan, *rest: Any) -> Trace:
    """Every micro batch counts alike, whatever its size."""
    loss = ClassificationTask.loss

    def mean(task: ClassificationTask, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        total, weight = loss(task, model, batch)
        return total / weight * plan.micro_batch, weight

    with patch.object(ClassificationTask, "loss", mean):
        return replay(rank, config, plan, *rest)


def seed_per_rank(rank: int, config: RunConfig, *rest: Any) -> Trace:
    """The sampler of each process shuffles for itself."""
    return replay(rank, config.model_copy(update={"seed": config.seed + rank}), *rest)


def augmentation_seed_per_rank(rank: int, *rest: Any) -> Trace:
    """The samples are right, and each process changes them by its own dice."""

    def assembled(*args: Any) -> Parts:
        parts = assemble(*args)
        parts.loader.pipeline.seed += rank
        return parts

    with patch.object(sys.modules["bigbatch.analysis.replay"], "assemble", assembled):
        return replay(rank, *rest)


def statistics_per_micro_batch(rank: int, *rest: Any) -> Trace:
    """Running statistics move with every forward pass, as nn.BatchNorm's do."""
    empty = BatchStats.empty

    def commit_first(stats: BatchStats, flag: bool) -> None:
        seen = {layer.seen for layer in stats._layers.values()} - {0}
        if seen:
            stats.commit(seen.pop())
        empty(stats, flag)

    with patch.object(BatchStats, "empty", commit_first):
        return replay(rank, *rest)


def skipped_sync(rank: int, *rest: Any) -> Trace:
    """The last micro batch's backward pass does not exchange gradients either."""
    exchange = Replicas.exchange

    def never(strategy: Replicas, *, when: bool) -> AbstractContextManager[Any]:
        return exchange(strategy, when=False)

    with patch.object(Replicas, "exchange", never):
        return replay(rank, *rest)


def skipped_sync_in_the_third_step(rank: int, *rest: Any) -> Trace:
    """As above, once; before the steps the model is tried twice."""
    exchange, calls = Replicas.exchange, 0

    def once(strategy: Replicas, *, when: bool) -> AbstractContextManager[Any]:
        nonlocal calls
        calls += 1
        return exchange(strategy, when=when and (strategy.divides_by == 1 or calls != 5))

    with patch.object(Replicas, "exchange", once):
        return replay(rank, *rest)


def sync_of_the_first(rank: int, *rest: Any) -> Trace:
    """Gradients are exchanged with the first micro batch instead of the last; later ones stay with their process."""
    exchange, first = Replicas.exchange, True

    def early(strategy: Replicas, *, when: bool) -> AbstractContextManager[Any]:
        nonlocal first
        now, first = first, when
        return exchange(strategy, when=now)

    with patch.object(Replicas, "exchange", early):
        return replay(rank, *rest)


def no_zero_weight(rank: int, *rest: Any) -> Trace:
    """A process that has no samples trains on its dummy."""
    mul = Tensor.__mul__

    def unless_zero(tensor: Tensor, other: Any) -> Tensor:
        return tensor if isinstance(other, int) and other == 0 and tensor.dim() == 0 else mul(tensor, other)

    with patch.object(torch.Tensor, "__mul__", unless_zero):
        return replay(rank, *rest)


def as_chaotic_as_its_rounding(rank: int, config: RunConfig, plan: Plan, folder: Path, role: Role) -> Trace:
    """No run at all: what one might leave behind whose rounding does as much as its layout."""
    return _trace(plan, {"reference": 0.0, "layout": 1e-6, "jolted": 2e-7}[role])


def more_chaotic_than_its_rounding(rank: int, config: RunConfig, plan: Plan, folder: Path, role: Role) -> Trace:
    """As above, but the layout does more."""
    return _trace(plan, {"reference": 0.0, "layout": 1e-6, "jolted": 2e-8}[role])


def _trace(plan: Plan, off: float) -> Trace:
    steps = plan.steps
    return Trace(
        ids=[torch.zeros(1, 2)] * steps,
        inputs=[torch.zeros(1)] * steps,
        lr=[0.1] * steps,
        loss=[1.0] + [1.0 + off] * (steps - 1),
        grad_norm=[1.0] * steps,
        skipped=[False] * steps,
        parameters=[(0.0, "")] * steps,
        statistics=[(0.0, "")] * steps,
    )
