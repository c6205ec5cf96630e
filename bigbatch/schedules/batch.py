"""The global batch of a run as a function of the samples seen before a step."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter


@dataclass(frozen=True)
class BatchSchedule:
    """A batch that grows: ``stages`` are (samples seen before, batch), ascending from 0 samples.

    Smith et al. 2017, arXiv:1711.00489: the noise of SGD goes as ε·N/B, with rate ε, N training samples and batch B, so
    a batch that grows by 1/factor does what a rate that falls by factor does, in fewer steps. A step is of the stage
    that it starts in, even where it ends in the next one.
    """

    stages: tuple[tuple[int, int], ...]

    def at(self, samples: int) -> int:
        """The batch of a step that starts after ``samples`` samples."""
        return self.stages[bisect_right(self.stages, samples, key=itemgetter(0)) - 1][1]

    def before(self, samples: int) -> tuple[int, int]:
        """How many steps start before ``samples`` samples, and the samples seen before the last of them."""
        steps = seen = last = 0
        for (_, batch), (end, _) in pairwise((*self.stages, (samples, 0))):
            more = max(0, -(-(min(end, samples) - seen) // batch))
            steps, seen = steps + more, seen + more * batch
            last = seen - batch if more else last
        return steps, last
