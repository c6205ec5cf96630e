"""What a run will do, as numbers. The trainer executes a Plan and decides nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from bigbatch.schedules import BatchSchedule, LrSchedule


@dataclass(frozen=True)
class Decision:
    """One chosen number with its reason and where the rule comes from."""

    what: str
    value: str
    why: str
    source: str


@dataclass(frozen=True)
class PlanWarning:
    """Something legal that large-batch training usually regrets."""

    code: str
    message: str


@dataclass(frozen=True)
class Plan:
    """Every number of a run. Lengths are in samples of the training part unless the name says steps or epochs.

    ``global_batch`` and ``accumulation`` are the first stage's where the batch grows.
    """

    world_size: int
    global_batch: int
    micro_batch: int
    accumulation: int
    batches: BatchSchedule
    bn_span: int | None
    bn_groups_fixed: bool
    dataset_size: int
    epoch_samples: int
    last: Literal["cross", "short", "drop"]
    steps: int
    samples: int
    stop_samples: int
    epochs: float
    lr_rule: str
    lr_scale: float
    lr_base: float
    lr_peak: float
    schedule: LrSchedule
    warmup_samples: int
    warmup_steps: int
    eval_every: int
    checkpoint_every: int
    track_every: int
    check_every: int | None
    warnings: tuple[PlanWarning, ...]
    decisions: tuple[Decision, ...]

    @property
    def span(self) -> int | None:
        """Samples of a batch-norm group where the recipe fixes it; None where it follows the micro batch."""
        return self.bn_span if self.bn_groups_fixed else None

    def batch(self, samples: int) -> int:
        """Global batch of the step that starts after ``samples``."""
        return self.batches.at(samples)

    def window(self, samples: int) -> int:
        """Samples of the step that starts after ``samples``: the global batch, or what is left of epoch or run."""
        left = self.samples - samples
        if self.last == "short":
            left = min(left, self.epoch_samples - samples % self.epoch_samples)
        return min(self.batch(samples), left)

    def lr(self, samples: int) -> float:
        """Learning rate of the step that starts after ``samples``."""
        return self.schedule.at(samples)

    def is_due(self, every: int, *, before: int, after: int) -> bool:
        """Whether a step from ``before`` to ``after`` samples crosses a multiple of ``every`` or ends the run."""
        return after // every > before // every or after >= self.samples

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as an indented JSON object; the keys are a contract."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
