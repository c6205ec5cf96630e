"""Which sample is seen when, and by whom: pure functions of the seed and of the number of samples seen before."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bigbatch.keyed import fold, hashed

Indices = NDArray[np.int64]

MOST_SORTED = 2**22
"""Samples up to which an epoch's order is sorted and kept; above it, each place is computed by itself."""


def order(n: int, *, seed: int, epoch: int) -> Indices:
    """The permutation of ``range(n)`` that ``epoch`` visits, int64 (n,): a pure function of its arguments.

    Sorts n raw 64-bit words of Philox with the key (seed, epoch). Unlike ``Generator.permutation``, raw words are the
    same in every numpy release, and so is the order.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def permute(positions: Indices, n: int, key: int | Indices) -> Indices:
    """π(positions) for the permutation π of ``range(n)`` that ``key`` picks, int64; costs what the positions cost.

    A Feistel network over the b bits of n - 1, the lower ⌊b/2⌋ in l and the others in h: round i does
    h ← h ⊕ H(i, key + l), or l ← l ⊕ H(i, key + h) if i is odd, H a hash cut to the half's bits. It permutes 2ᵇ < 2n
    numbers; one that lands outside range(n) goes through again until it is inside (cycle walking, Black and Rogaway
    2002, "Ciphers with arbitrary finite domains"), which leaves a permutation of range(n). ``key`` is a random 64-bit
    word, or one for each position; positions that have the same word share their π.
    """
    bits = (n - 1).bit_length()
    low = bits // 2
    word = key if isinstance(key, int) else torch.from_numpy(key)
    upper, lower = torch.from_numpy(positions >> low), torch.from_numpy(positions & (1 << low) - 1)
    # 8 rounds, but halves of a few bits mix slowly: with 8, χ² over 200,000 keys sees that n = 5 and 9 are not uniform
    for i in range(0, 24 if bits < 8 else 8, 2):
        upper = upper ^ hashed(i, lower + word) & (1 << bits - low) - 1
        lower = lower ^ hashed(i + 1, upper + word) & (1 << low) - 1
    found: Indices = (upper << low | lower).numpy()
    outside = found >= n
    if outside.any():
        found[outside] = permute(found[outside], n, key if isinstance(key, int) else key[outside])
    return found


class Stream:
    """The endless sequence of samples: the epochs' permutations, one after another.

    The sample at position p, the number of samples seen before it, belongs to epoch p // E and is the
    (p mod E)-th of that epoch's order. E, ``epoch_samples``, is at most ``size``; what an epoch leaves out it drops.

    ``shuffle`` w < ``size`` keeps windows of w consecutive samples together (the last may be shorter): an epoch visits
    the windows in a random order, and the samples of each in a random order. No memory per sample is needed then, nor
    with more than ``MOST_SORTED`` samples.
    """

    def __init__(self, size: int, *, seed: int, epoch_samples: int, shuffle: int | Literal["all"] = "all") -> None:
        assert 0 < epoch_samples <= size
        self.size, self.seed, self.epoch_samples = size, seed, epoch_samples
        self.window = size if shuffle == "all" else min(shuffle, size)
        self._orders: dict[int, Indices] = {}

    def locate(self, positions: range | Indices) -> tuple[Indices, Indices]:
        """(sample index, epoch) of each position, int64."""
        if isinstance(positions, range):
            epoch, first = divmod(positions.start, self.epoch_samples)
            if positions.step == 1 and first + len(positions) <= self.epoch_samples:
                index = self._visited(slice(first, first + len(positions)), epoch)
                return index, np.full(len(index), epoch, dtype=np.int64)
            positions = np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.epoch_samples)
        index = np.empty_like(epochs)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            index[here] = self._visited(offsets[here], epoch)
        return index, epochs

    def _visited(self, offsets: Indices | slice, epoch: int) -> Indices:
        """What an epoch visits at ``offsets``."""
        if self.window == self.size <= MOST_SORTED:
            return self._order(epoch)[offsets]
        if isinstance(offsets, slice):
            offsets = np.arange(offsets.start, offsets.stop, dtype=np.int64)
        if self.window < self.size:
            return self._windowed(offsets, epoch)
        return permute(offsets, self.size, fold(self.seed, epoch))

    def _windowed(self, offsets: Indices, epoch: int) -> Indices:
        whole, rest = divmod(self.size, self.window)
        # The shorter window comes at a random place among the whole ones, whose order then needs no inverse.
        start = fold(self.seed, epoch, -1) % (whole + 1) * self.window
        short = (start <= offsets) & (offsets < start + rest)
        rank, place = np.divmod(offsets[~short] - rest * (offsets[~short] >= start), self.window)
        window = permute(rank, whole, fold(self.seed, epoch))
        key = hashed(self.seed, epoch, torch.from_numpy(window)).numpy()
        index = np.empty_like(offsets)
        index[~short] = window * self.window + permute(place, self.window, key)
        index[short] = whole * self.window + permute(offsets[short] - start, rest, fold(self.seed, epoch, whole))
        return index

    def _order(self, epoch: int) -> Indices:
        if epoch not in self._orders:
            if len(self._orders) == 2:  # a window seldom touches more, and each costs 8 bytes a sample
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = order(self.size, seed=self.seed, epoch=epoch)
        return self._orders[epoch]


@lru_cache(maxsize=64)
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
