"""The parts of a run, its clock, and what a step reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bigbatch.config import RunConfig
from bigbatch.data import Loader, Preprocessing
from bigbatch.dist import Runtime, Strategy
from bigbatch.dropout import KeyedDropout
from bigbatch.norm import BatchStats
from bigbatch.plan import Plan, PlanWarning
from bigbatch.tasks import Task

from .scale import LossScale


class RunError(RuntimeError):
    """The run cannot go on, for a reason the message gives; the CLI exits 1 with it, without a traceback."""


class Preempted(Exception):
    """The run was asked to stop and has saved all that it is; the same command goes on."""


@dataclass
class Clock:
    """Where a run is. Samples are the clock; ``skipped_in_a_row`` counts steps whose gradient was not finite."""

    samples: int = 0
    step: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Parts:
    """All that a step needs, assembled. ``strategy`` owns model and optimiser; ``model`` is the module itself.

    ``dropout`` is None for a model that draws no random numbers, or where torch's own generator is to draw them.
    ``own_buffers`` are not the same on every process. ``preprocessing`` is that of images. ``warnings`` are
    those that only the data or the model could give.
    """

    config: RunConfig
    plan: Plan
    runtime: Runtime
    task: Task
    loader: Loader
    model: nn.Module
    strategy: Strategy
    stats: BatchStats
    scale: LossScale | None
    dropout: KeyedDropout | None
    own_buffers: frozenset[str]
    preprocessing: Preprocessing | None
    warnings: tuple[PlanWarning, ...]


@dataclass(frozen=True)
class StepReport:
    """One optimiser step. ``loss`` is the mean over the window; ``stop``: some process was asked to stop."""

    loss: float
    lr: float
    grad_norm: float
    global_batch: int
    skipped: bool
    stop: bool
