"""The batch ramp: milestones that grow the batch instead of lowering the rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from bigbatch.config import ConfigError, RunConfig
from bigbatch.config import models as m
from bigbatch.schedules import BatchSchedule

SMITH = "Smith et al. 2017, arXiv:1711.00489"


def check_ramp(config: RunConfig) -> None:
    """ConfigError for a ramp where the recipe allows none, and for ``batch.max`` without one."""
    if config.decay.by == "lr":
        if config.batch.max is not None:
            raise ConfigError(f"batch.max = {config.batch.max}: decay.by is lr; set decay.by=batch or remove batch.max")
        return
    if not isinstance(config.decay, m.Step | m.MultiStep):
        raise ConfigError(
            f"decay.by = batch: decay.kind {config.decay.kind} has no milestones for the batch to grow at; use "
            "decay.by=lr, or decay.kind=step or multistep"
        )
    if config.data.last != "cross":
        raise ConfigError(f"data.last = {config.data.last}: decay.by=batch has no fixed window; use data.last=cross")
    if config.duration.unit == "st":
        raise ConfigError(f"duration = {config.duration}: with decay.by=batch steps differ in size; use ep or ex")


def batch_ramp(batch: m.Batch, *, factor: float, milestones: Sequence[int], total: int) -> BatchSchedule:
    """The global batch, times 1/factor at each of the ``milestones`` (samples) until a growth would pass batch.max.

    Raises ConfigError where 1/factor is not whole, batch.max leaves no growth, or a batch passes the run's ``total``.
    """
    first, limit, inverse = batch.global_, batch.max, 1 / Fraction(factor)
    growth = round(inverse)
    if growth < 2 or not math.isclose(growth / inverse, 1, rel_tol=1e-6):
        legal = sorted({max(2, math.floor(inverse)), max(2, math.ceil(inverse))})
        raise ConfigError(
            f"decay.factor = {factor:g}: with decay.by=batch the batch grows by 1/factor, a whole number from 2 on; "
            f"nearest legal: {' or '.join(f'{1 / k:.7g} ({k} times)' for k in legal)}"
        )
    if limit is not None and limit < first * growth:
        raise ConfigError(
            f"batch.max = {limit}: a batch.global of {first} cannot grow {growth} times; use at least "
            f"{first * growth}, or decay.by=lr without batch.max"
        )
    stages = [(0, first)]
    for milestone in milestones:
        grown = stages[-1][1] * growth
        if limit is not None and grown > limit:
            break
        if grown > total:
            way_out = f"batch.max={stages[-1][1]}" if len(stages) > 1 else "decay.by=lr"
            raise ConfigError(
                f"decay.by = batch: at {milestone} samples the batch grows to {grown}, more than the run's {total} "
                f"samples; lengthen duration or set {way_out}"
            )
        stages.append((milestone, grown))
    return BatchSchedule(tuple(stages))
