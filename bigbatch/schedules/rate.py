"""The learning rate of a run as a function of the samples seen before a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from . import curves

DecayKind = Literal[
    "constant", "linear", "step", "multistep", "exponential", "inverse_time",
    "cosine", "poly", "one_cycle", "warm_restarts",
]  # fmt: skip


@dataclass(frozen=True)
class LrSchedule:
    """Warmup, then a decay. Every length is in samples, so the schedule knows neither steps nor processes.

    Warmup (Goyal et al. 2017, arXiv:1706.02677, section 2.2): ``gradual`` rises in a straight line from ``start`` to
    ``peak`` over the first ``warmup`` samples; ``constant`` stays at ``start`` and then jumps (He et al. 2016,
    arXiv:1512.03385). After it the rate is peak × decay. ``linear``, ``cosine`` and ``poly`` run from the end of the
    warmup to the end of the run, ``exponential``, ``inverse_time`` and ``warm_restarts`` count from the end of the
    warmup, ``step`` and ``multistep`` from the start of the run, as their papers give epochs.
    """

    peak: float
    start: float
    warmup: int
    total: int
    warmup_kind: Literal["gradual", "constant", "none"] = "none"
    decay: DecayKind = "constant"
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, samples: int) -> float:
        """The rate of a step that starts after ``samples`` samples."""
        if samples < self.warmup:
            if self.warmup_kind == "constant":
                return self.start
            return self.start + (self.peak - self.start) * samples / self.warmup
        return self.peak * self._share(samples)

    def _share(self, samples: int) -> float:
        after = samples - self.warmup
        match self.decay:
            case "constant":
                return 1.0
            case "linear" | "cosine" | "poly":
                return float(getattr(curves, self.decay)(after / (self.total - self.warmup), **self.options))
            case "step" | "multistep":
                return float(getattr(curves, self.decay)(samples, **self.options))
            case "one_cycle":
                return curves.one_cycle(samples, total=self.total, **self.options)
            case _:
                return float(getattr(curves, self.decay)(after, **self.options))
