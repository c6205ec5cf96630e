from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.keyed import fold, hashed, uniform
from reference.splitmix64 import MASK, outputs

word = st.integers(0, 2**62)


def test_published_outputs_of_the_generator():
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    assert [fold(k) for k in range(5)] == [output >> 1 for output in first]
    assert (hashed(torch.arange(5)) & MASK >> 1).tolist() == [output & MASK >> 1 for output in first]


@given(st.integers(0, 2**32 - 1), st.integers(0, 50), st.integers(0, 50), st.integers(0, 8))
def test_uniform_equals_chained_generators(seed, epoch, sample, draw):
    state = 0
    for key in (seed % 64, epoch, sample, draw):
        state = outputs(state, key + 1)[-1]
    got = uniform(seed % 64, torch.tensor([epoch]), torch.tensor([sample]), draw=draw)
    assert got.tolist() == [(state >> 11) / 2**53]


@given(st.lists(word, min_size=1, max_size=5))
def test_fold_agrees_with_the_tensor_hash(keys):
    folded = fold(*keys)
    assert 0 <= folded < 2**63
    torch.Generator().manual_seed(folded)  # takes it
    for tensors in range(len(keys)):  # wherever the first tensor stands
        mixed = [torch.tensor(k) if i >= tensors else k for i, k in enumerate(keys)]
        assert int(hashed(*mixed)) >> 1 & MASK >> 1 == folded


def test_draws_do_not_depend_on_company_or_shape():
    index, epoch = torch.arange(1000), torch.arange(1000) // 300
    whole = uniform(5, epoch, index, draw=2)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(5, epoch[shuffled], index[shuffled], draw=2), whole[shuffled])
    pieces = [uniform(5, epoch[a : a + 7], index[a : a + 7], draw=2) for a in range(0, 1000, 7)]
    assert torch.equal(torch.cat(pieces), whole)
    several = uniform(5, epoch, index, draw=torch.arange(4)[:, None])
    assert torch.equal(several[2], whole)


def test_range_and_type():
    u = uniform(0, torch.arange(200_000), draw=0)
    assert u.dtype == torch.float64
    assert u.min() >= 0 and u.max() < 1
    assert torch.equal(u * 2**53, (u * 2**53).floor())


def families():
    """100,000 draws each: along samples, epochs, seeds and draws, all as small counters, as training uses them."""
    n = torch.arange(100_000)
    zero = torch.zeros_like(n)
    return {
        "sample": uniform(3, zero, n, draw=1),
        "epoch": uniform(3, n, zero, draw=1),
        "draw": uniform(3, zero, zero, draw=n),
        "seed": uniform(n, zero, zero, draw=0),
        "sample and epoch": uniform(0, n // 317, n % 317, draw=0),
    }


@pytest.mark.parametrize("name", list(families()))
def test_draws_look_uniform_and_independent(name):
    u = families()[name]
    n = len(u)
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * n)
    assert abs(u.var() - 1 / 12) < 4 / math.sqrt(180 * n)
    centred = (u - 0.5) * math.sqrt(12)
    for lag in (1, 2, 3, 16, 317, 4096):
        assert abs((centred[:-lag] * centred[lag:]).mean()) < 4 / math.sqrt(n - lag)
    coarse = (u * 30).long()
    assert chi_square((u * 1000).long(), cells=1000) < 4.5
    assert chi_square(coarse[0::2] * 30 + coarse[1::2], cells=900) < 4.5
    assert chi_square((u * 2**53).long() % 1024, cells=1024) < 4.5  # the lowest bits


def chi_square(cell, *, cells):
    """Pearson's χ² of equally likely cells, in standard deviations from its mean."""
    counts = torch.bincount(cell, minlength=cells).double()
    expected = len(cell) / cells
    return abs(float(((counts - expected) ** 2 / expected).sum()) - (cells - 1)) / math.sqrt(2 * (cells - 1))


def test_families_of_draws_are_uncorrelated():
    n = torch.arange(100_000)
    draws = uniform(9, torch.zeros_like(n), n, draw=torch.arange(8)[:, None])
    neighbours = torch.stack([uniform(9, torch.ones_like(n), n, draw=0), uniform(10, torch.zeros_like(n), n, draw=0)])
    correlation = torch.corrcoef(torch.cat([draws, neighbours])) - torch.eye(10)
    assert correlation.abs().max() < 4.5 / math.sqrt(len(n))


def test_one_changed_bit_changes_half_of_the_bits():
    keys = hashed(1, torch.arange(2000)) & MASK >> 2
    flips = [(hashed(7, keys) ^ hashed(7, keys ^ 1 << bit)) for bit in range(62)]
    for changed in flips:
        share = torch.stack([(changed >> i & 1).double().mean() for i in range(64)])
        assert share.min() > 0.44 and share.max() < 0.56
