"""Exact evaluation: every sample counts once, whatever the number of processes."""

from __future__ import annotations

from itertools import zip_longest

import torch

from bigbatch.data import DataError, Split

from .state import Parts


def evaluate(parts: Parts, split: Split) -> dict[str, float]:
    """The task's metrics over a whole part of the dataset, equal on every process.

    Running batch-norm statistics are merged over processes first, and there is one sum at the end. Where the forward
    passes between are collectives, a process with fewer batches than another makes up for them with dummies. Raises
    `DataError`, on every process, where no sample can be read.
    """
    runtime, size = parts.runtime, parts.config.eval.batch
    parts.stats.merge(runtime.sum, runtime.rank)
    parts.model.eval()
    # Named by the task, so that a process whose share is empty takes part in the sum; the last is that of samples.
    total, samples = torch.zeros(len(parts.task.sums) + 1, dtype=torch.float64, device=runtime.device), 0
    batches = parts.loader.evaluate(split, rank=runtime.rank, world_size=runtime.world_size, batch=size)
    rounds = parts.loader.rounds(split, world_size=runtime.world_size, batch=size) if parts.strategy.lockstep else 0
    with torch.no_grad(), runtime.autocast():
        for batch, _ in zip_longest(batches, range(rounds)):
            runtime.progress.enter("eval")
            found = parts.task.evaluate(parts.model, batch or parts.loader.train(range(0)))
            if batch:
                total[:-1] += torch.stack([found[name] for name in parts.task.sums])
                samples += len(batch["index"])
    parts.model.train()
    total[-1] = samples
    runtime.sum(total)
    *sums, samples = total.tolist()
    if not samples:
        size = len(parts.loader.dataset.part(split))
        raise DataError(f"data.{split}: none of its {size} samples can be read; mend them, or evaluate on others")
    return parts.task.metrics(dict(zip(parts.task.sums, sums, strict=True)))


def unreadable(parts: Parts) -> dict[str, str]:
    """Samples that were passed over since the last call because they cannot be read, by name, and why; equal on every
    process, whichever met them. A collective."""
    problems = parts.loader.reader.problems
    found = parts.runtime.collect(dict(problems))
    problems.clear()
    return dict(sorted(pair for each in found for pair in each.items()))
