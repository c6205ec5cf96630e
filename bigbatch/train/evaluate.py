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
    sums: dict[str, torch.Tensor] = {}
    batches = parts.loader.evaluate(
        split, rank=runtime.rank, world_size=runtime.world_size, batch=parts.config.eval.batch
    )
    with torch.no_grad(), runtime.autocast():
        for batch in batches:
            for name, value in parts.task.evaluate(parts.model, batch).items():
                sums[name] = sums.get(name, 0) + value
    parts.model.train()
    total = torch.stack([sums[name] for name in sorted(sums)])
    runtime.sum(total)
    return parts.task.metrics(dict(zip(sorted(sums), total.tolist(), strict=True)))
