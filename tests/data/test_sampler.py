from __future__ import annotations

import tracemalloc
from itertools import groupby, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from bigbatch.data import Stream, order, permute, shares
from bigbatch.keyed import fold, hashed


@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_order_is_a_permutation_and_a_pure_function(n, seed, epoch):
    first = order(n, seed=seed, epoch=epoch)
    assert first.dtype == np.int64
    assert np.array_equal(np.sort(first), np.arange(n))
    assert np.array_equal(first, order(n, seed=seed, epoch=epoch))


def test_order_differs_by_seed_and_by_epoch():
    orders = {(s, e): order(50, seed=s, epoch=e).tobytes() for s in range(4) for e in range(4)}
    assert len(set(orders.values())) == 16


def test_order_is_the_same_on_every_machine():
    assert order(10, seed=7, epoch=3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


def permuted(n, *, seed, epoch):
    return permute(np.arange(n), n, fold(seed, epoch))


@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.data())
def test_permute_is_a_permutation_and_a_pure_function_of_each_place(n, seed, epoch, data):
    whole = permuted(n, seed=seed, epoch=epoch)
    assert whole.dtype == np.int64
    assert np.array_equal(np.sort(whole), np.arange(n))
    some = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=5)), dtype=np.int64)
    assert np.array_equal(permute(some, n, fold(seed, epoch)), whole[some])
    other = permuted(n, seed=seed, epoch=epoch + 1)
    words = np.array([fold(seed, epoch + int(p) % 2) for p in some], dtype=np.int64)
    assert np.array_equal(permute(some, n, words), np.where(some % 2, other[some], whole[some]))


def test_permute_differs_by_seed_and_by_epoch():
    orders = {(s, e): permuted(50, seed=s, epoch=e).tobytes() for s in range(4) for e in range(4)}
    assert len(set(orders.values())) == 16


def test_permute_is_the_same_on_every_machine():
    assert permuted(10, seed=7, epoch=3).tolist() == [1, 7, 5, 3, 8, 2, 0, 9, 6, 4]
    last = np.arange(10**12 - 3, 10**12)
    assert permute(last, 10**12, fold(7, 3)).tolist() == [702139370936, 165816783801, 50508782494]


def test_every_place_gets_every_sample_equally_often():
    trials, n = 3000, 6
    counts = np.zeros((n, n))
    for epoch in range(trials):
        counts[np.arange(n), order(n, seed=1, epoch=epoch)] += 1
    expected = trials / n
    assert ((counts - expected) ** 2 / expected).sum() < 54.05  # χ², 25 degrees of freedom, p = 0.0007


@pytest.mark.parametrize("n", [3, 5, 6, 9, 16, 25])
def test_permute_sends_every_place_and_every_pair_everywhere_equally_often(n):
    trials = 40_000
    words = hashed(5, torch.arange(trials)).numpy()
    visited = [permute(np.full(trials, place), n, words) for place in range(n)]
    counts = np.stack([np.bincount(there, minlength=n) for there in visited])
    expected = trials / n
    # rows and columns of the counts add up, which leaves (n - 1)² degrees of freedom
    assert chi2.sf((n - 1) / n * ((counts - expected) ** 2 / expected).sum(), (n - 1) ** 2) > 0.0007
    pairs = np.bincount(visited[1] * n + visited[2], minlength=n * n)[~np.eye(n, dtype=bool).flatten()]
    expected = trials / (n * (n - 1))
    assert chi2.sf(((pairs - expected) ** 2 / expected).sum(), n * (n - 1) - 1) > 0.0007


@given(st.integers(1, 40), st.data())
def test_stream_is_the_epochs_one_after_another(size, data):
    epoch_samples = data.draw(st.integers(1, size))
    start, length = data.draw(st.integers(0, 5 * size)), data.draw(st.integers(0, 4 * size))
    stream = Stream(size, seed=3, epoch_samples=epoch_samples)
    index, epoch = stream.locate(range(start, start + length))
    expected = [(int(order(size, seed=3, epoch=p // epoch_samples)[p % epoch_samples]), p // epoch_samples)
                for p in range(start, start + length)]  # fmt: skip
    assert list(zip(index.tolist(), epoch.tolist(), strict=True)) == expected
    assert index.dtype == epoch.dtype == np.int64


def test_stream_takes_positions_in_any_order():
    stream = Stream(10, seed=0, epoch_samples=10)
    index, epoch = stream.locate(range(100))
    some = np.array([99, 0, 54, 54, 10])
    assert np.array_equal(np.stack(stream.locate(some)), np.stack([index[some], epoch[some]]))


def test_stream_sorts_an_epoch_once_and_keeps_two(monkeypatch):
    made = []

    def counting(n, *, seed, epoch):
        made.append(epoch)
        return order(n, seed=seed, epoch=epoch)

    monkeypatch.setattr("bigbatch.data.sampler.order", counting)
    stream = Stream(10, seed=0, epoch_samples=10)
    for start in range(0, 60, 3):
        stream.locate(range(start, start + 3))
    assert made == list(range(6))
    assert len(stream._orders) == 2


def test_a_big_dataset_needs_no_memory():
    tracemalloc.start()
    stream = Stream(10**12, seed=0, epoch_samples=10**12)
    index, epoch = stream.locate(range(10**12 - 2048, 10**12 + 2048))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert epoch.tolist() == [0] * 2048 + [1] * 2048
    assert len(set(index.tolist())) == 4096 and index.min() >= 0 and index.max() < 10**12
    assert abs(index.mean() / 10**12 - 0.5) < 4 * 12**-0.5 / 4096**0.5
    assert np.array_equal(stream.locate(np.array([10**12 + 7]))[0], index[2055:2056])


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 5), st.data())
def test_windows_are_shuffled_and_stay_together(size, window, epoch, data):
    stream = Stream(size, seed=3, epoch_samples=size, shuffle=window)
    index, _ = stream.locate(range(epoch * size, (epoch + 1) * size))
    assert np.array_equal(np.sort(index), np.arange(size))
    if window >= size:
        assert np.array_equal(index, order(size, seed=3, epoch=epoch))
    runs = [number for number, _ in groupby((index // window).tolist())]
    assert len(runs) == -(-size // window)
    start = data.draw(st.integers(0, size - 1))  # nor does it matter who asks for which part
    part, _ = stream.locate(range(epoch * size + start, (epoch + 1) * size))
    assert np.array_equal(part, index[start:])


def test_the_order_of_windows_and_that_within_them_is_random():
    trials, size, window = 400, 10, 4
    first, within = np.zeros(3), np.zeros((4, 4))
    stream = Stream(size, seed=1, epoch_samples=size, shuffle=window)
    for epoch in range(trials):
        index, _ = stream.locate(range(epoch * size, (epoch + 1) * size))
        first[index[0] // window] += 1
        within[np.arange(4), index[index // window == 1] % window] += 1
    assert ((first - trials / 3) ** 2 / (trials / 3)).sum() < 14.5  # χ², 2 degrees of freedom, p = 0.0007
    assert ((within - trials / 4) ** 2 / (trials / 4)).sum() < 28.7  # χ², 9 degrees of freedom, p = 0.0007


# ------------------------------------------------------------------------------------------------ shares


@st.composite
def layouts(draw):
    """A global batch and span, and two layouts that allow them: (micro, world size, accumulation)."""
    span = draw(st.integers(1, 6))
    groups = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
    batch = span * groups
    legal = [
        (batch // (w * a), w, a)
        for w in range(1, 7)
        for a in range(1, batch + 1)
        if batch % (w * a) == 0 and fits(batch // (w * a), w, span)
    ]
    return batch, span, draw(st.sampled_from(legal)), draw(st.sampled_from(legal))


def fits(micro, world_size, span):
    return micro % span == 0 or (span % micro == 0 and world_size % (span // micro) == 0)


def cut(samples, layout, span):
    micro, world_size, accumulation = layout
    return shares(samples, micro=micro, world_size=world_size, accumulation=accumulation, span=span)


def partition(steps):
    return [p for step in steps for share in step for p in share]


@given(layouts(), st.data())
def test_shares_partition_the_window_in_order(case, data):
    batch, span, layout, _ = case
    samples = data.draw(st.integers(1, batch))
    for s in (span, None):
        steps = cut(samples, layout, s)
        assert partition(steps) == list(range(samples))
        assert all(len(step) == layout[1] for step in steps)
        assert all(any(share for share in step) for step in steps)
        assert len(steps) <= layout[2]


@given(layouts())
def test_full_window_is_the_formula(case):
    batch, span, (m, w, accumulation), _ = case
    expected = [[range(a * w * m + r * m, a * w * m + (r + 1) * m) for r in range(w)] for a in range(accumulation)]
    assert cut(batch, (m, w, accumulation), span) == expected == cut(batch, (m, w, accumulation), None)


def batch_norm_groups(steps, *, micro, span):
    """Which samples share statistics: what a layer that only sees its share, and its block of ranks, would do."""
    groups = []
    for step in steps:
        if span <= micro:
            for share in filter(len, step):
                count = max(1, len(share) // span)
                bounds = [share.start + span * g for g in range(count)] + [share.stop]
                groups += [tuple(range(*pair)) for pair in pairwise(bounds)]
        else:
            q = span // micro
            blocks = [step[i : i + q] for i in range(0, len(step), q)]
            groups += [tuple(p for share in block for p in share) for block in blocks if any(block)]
    return groups


@given(layouts(), st.data())
def test_groups_are_the_same_in_every_layout(case, data):
    batch, span, one, other = case
    samples = data.draw(st.integers(1, batch))
    groups = [batch_norm_groups(cut(samples, layout, span), micro=layout[0], span=span) for layout in (one, other)]
    assert groups[0] == groups[1]
    assert len(groups[0]) == max(1, samples // span)
    assert all(len(group) == span for group in groups[0][:-1])


@given(layouts(), st.data())
def test_a_group_is_split_evenly_and_no_share_grows_much(case, data):
    batch, span, (m, w, a), _ = case
    steps = cut(data.draw(st.integers(1, batch)), (m, w, a), span)
    assert max(len(share) for step in steps for share in step) <= m + min(span - 1, m)
    if span > m:
        q = span // m
        for step in steps:
            for i in range(0, w, q):
                sizes = [len(share) for share in step[i : i + q]]
                assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_short_windows_by_hand():
    # span 2 in micro batches of 4: five groups, the last of 3; the second rank of the second micro-step gets none
    assert cut(11, (4, 2, 2), 2) == [[range(0, 4), range(4, 8)], [range(8, 11), range(11, 11)]]
    # span 4 over pairs of ranks
    assert cut(11, (2, 4, 2), 4) == [[range(0, 2), range(2, 4), range(4, 8), range(8, 11)]]
    # fewer samples than one group, and than ranks
    assert cut(2, (1, 3, 2), 3) == [[range(0, 1), range(1, 2), range(2, 2)]]
    # no groups: every m samples
    assert cut(11, (4, 2, 2), None) == [[range(0, 4), range(4, 8)], [range(8, 11), range(11, 11)]]
    assert cut(9, (4, 2, 2), None) == [[range(0, 4), range(4, 8)], [range(8, 9), range(9, 9)]]


@pytest.mark.parametrize("samples", [0, 17])
def test_impossible_window_is_our_mistake(samples):
    with pytest.raises(AssertionError):
        cut(samples, (4, 2, 2), None)
