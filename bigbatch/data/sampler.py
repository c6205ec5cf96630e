"""Which sample is seen when, and by whom: pure functions of the seed and of the number of samples seen before."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def order(n: int, *, seed: int, epoch: int) -> Indices:
    """The permutation of ``range(n)`` that ``epoch`` visits, int64 (n,): a pure function of its arguments.

    Sorts n raw 64-bit words of Philox with the key (seed, epoch). Unlike ``Generator.permutation``, raw words are the
    same in every numpy release, and so is the order.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


class Stream:
    """The endless sequence of samples: the epochs' permutations, one after another.

    The sample at position p, the number of samples seen before it, belongs to epoch p // E and is the
    (p mod E)-th of that epoch's order. E, ``epoch_samples``, is at most ``size``; what an epoch leaves out it drops.
    """

    def __init__(self, size: int, *, seed: int, epoch_samples: int) -> None:
        assert 0 < epoch_samples <= size
        self.size, self.seed, self.epoch_samples = size, seed, epoch_samples
        self._orders: dict[int, Indices] = {}

    def locate(self, positions: range | Indices) -> tuple[Indices, Indices]:
        """(sample index, epoch) of each position, int64."""
        if isinstance(positions, range):
            positions = np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.epoch_samples)
        index = np.empty_like(epochs)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            index[here] = self._order(epoch)[offsets[here]]
        return index, epochs

    def _order(self, epoch: int) -> Indices:
        if epoch not in self._orders:
            if len(self._orders) == 2:  # a window seldom touches more, and each costs 8 bytes a sample
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = order(self.size, seed=self.seed, epoch=epoch)
        return self._orders[epoch]


def shares(samples: int, *, micro: int, world_size: int, accumulation: int, span: int | None) -> list[list[range]]:
    """How a window of ``samples`` is cut: ``[micro_step][rank]`` is a range of positions within the window.

    With m = micro, W = world_size, A = accumulation, the full window (samples = A·W·m) gives micro-step a and rank r
    [a·W·m + r·m, a·W·m + (r+1)·m). A shorter one keeps its max(1, samples // span) batch-norm groups whole and in
    order, the last one with the remainder, so that they are the same groups in every layout. Each (a, r) takes m / span
    groups; or, with span = q·m, a block of q neighbouring ranks shares one group, the first ranks one sample more.
    The last share can thus exceed m, by at most min(span - 1, m) samples. Without ``span`` the window is cut every m
    samples. Ranks that get nothing have an empty range; micro-steps in which nobody gets anything are left out.
    """
    assert 0 < samples <= micro * world_size * accumulation
    if span is None:
        cuts = [*range(0, samples, micro), samples]
    else:
        groups = [*range(0, max(samples - span, 0) + 1, span), samples]
        if span <= micro:
            assert micro % span == 0
            cuts = [*groups[: -1 : micro // span], samples]
        else:
            q = span // micro
            assert span % micro == 0 and world_size % q == 0
            parts = [(low, *divmod(high - low, q)) for low, high in pairwise(groups)]
            cuts = [low + i * each + min(i, more) for low, each, more in parts for i in range(q)] + [samples]
    slots = [range(low, high) for low, high in pairwise(cuts)]
    slots += [range(samples, samples)] * (-len(slots) % world_size)
    steps = [slots[i : i + world_size] for i in range(0, len(slots), world_size)]
    assert len(steps) <= accumulation
    return steps
