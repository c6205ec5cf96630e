"""Exact evaluation: every sample counts once, whatever the number of processes."""

from __future__ import annotations

from typing import Literal

import torch

from .state import Parts

Split = Literal["train", "validation", "test"]


def evaluate(parts: Parts, split: Split) -> dict[str, float]:
    """The task's metrics over a whole part of the dataset, equal on every process.

    Running batch-norm statistics are merged over processes first. The only collective is one sum at the end, so uneven
    shares need no padding.
    """
    runtime = parts.runtime
    parts.stats.merge(runtime.sum, runtime.rank)
    parts.model.eval()
    # Named by the task, so that a process whose share is empty takes part in the sum.
    total = torch.zeros(len(parts.task.sums), dtype=torch.float64, device=runtime.device)
    batches = parts.loader.evaluate(
        split, rank=runtime.rank, world_size=runtime.world_size, batch=parts.config.eval.batch
    )
    with torch.no_grad(), runtime.autocast():
        for batch in batches:
            sums = parts.task.evaluate(parts.model, batch)
            total += torch.stack([sums[name] for name in parts.task.sums])
    parts.model.train()
    runtime.sum(total)
    return parts.task.metrics(dict(zip(parts.task.sums, total.tolist(), strict=True)))
