"""Dynamic loss scaling for fp16."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScale:
    """Keeps fp16 gradients representable (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

    The scale halves when a gradient overflowed (that step is skipped) and doubles after ``interval`` steps in a row
    that did not. All processes see the same reduced gradient, so they agree without asking.
    """

    value: float = 65536.0
    interval: int = 2000
    good_steps: int = 0

    def update(self, *, finite: bool) -> None:
        if not finite:
            self.value, self.good_steps = self.value / 2, 0
            return
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.value, self.good_steps = self.value * 2, 0
