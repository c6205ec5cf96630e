from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.data import Stream, order, shares


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


def test_every_place_gets_every_sample_equally_often():
    trials, n = 3000, 6
    counts = np.zeros((n, n))
    for epoch in range(trials):
        counts[np.arange(n), order(n, seed=1, epoch=epoch)] += 1
    expected = trials / n
    assert ((counts - expected) ** 2 / expected).sum() < 54.05  # χ², 25 degrees of freedom, p = 0.0007


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
