from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.config.models import Augment, Digits
from bigbatch.data import Stream, load_data, mix_images, partners
from bigbatch.keyed import uniform
from images import image_loader
from reference.mix import mix_window

KINDS = [{"mixup": 0.3}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 0.7}]
OWN = {"shift": 1, "flip": True, "erase": 0.4}
DIGITS = load_data(Digits(name="digits"), seed=0)


def loader(augment, *, dtype=torch.float64):
    stream = Stream(1085, seed=4, epoch_samples=1085)
    return image_loader(DIGITS, stream=stream, augment=augment, seed=4, device=torch.device("cpu"), dtype=dtype)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 57])
def test_a_window_is_the_loop_over_its_pixels(kinds, size):
    positions = range(1060, 1060 + size)  # on into the next epoch
    plain = loader(Augment(**OWN)).train(positions)
    got = loader(Augment(**OWN, **kinds)).train(positions)
    u = torch.stack([uniform(4, plain["epoch"], plain["index"], draw=d) for d in range(8, 12)], 1)
    images, labels, shares = mix_window(
        plain["image"].numpy(), plain["label"].numpy(), **{"mixup": 0, "cutmix": 0, **kinds}, u=u.numpy()
    )
    np.testing.assert_allclose(got["image"].numpy(), images, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got["share"].numpy(), shares, rtol=1e-12, atol=1e-15)
    assert np.array_equal(got["label2"].numpy(), labels) and got["label2"].dtype == torch.int64
    assert all(torch.equal(got[name], plain[name]) for name in ("label", "index", "epoch"))


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(0, 2000), st.sets(st.integers(0, 30)), st.sampled_from(KINDS))
def test_a_window_is_the_same_however_it_is_cut(size, start, cuts, kinds):
    window = range(start, start + size)
    whole = loader(Augment(**OWN, **kinds), dtype=torch.float32).train(window)
    bounds = [0, *sorted(c for c in cuts if 0 < c < size), size]
    pieces = [
        loader(Augment(**OWN, **kinds), dtype=torch.float32).train(window[low:high], window=window)
        for low, high in pairwise(bounds)
    ]
    assert all(torch.equal(torch.cat([piece[name] for piece in pieces]), whole[name]) for name in whole)


@given(st.integers(1, 40), st.data())
def test_at_most_two_neighbours_are_loaded(size, data):
    window = range(100, 100 + size)
    low = data.draw(st.integers(0, size - 1))
    share = window[low : data.draw(st.integers(low + 1, size))]
    near, partner = partners(share, window)
    assert set(share) <= set(near) <= set(window) and len(near) <= len(share) + 2
    other = [near[int(p)] for p in partner]
    assert all(b != a or size == 1 for a, b in zip(share, other, strict=True))


def test_off_is_the_batch_without_mixing_and_evaluation_is_never_mixed():
    off, on = loader(Augment(**OWN, mixup=0, cutmix=0)), loader(Augment(**OWN, mixup=1, cutmix=1))
    names = {"image", "label", "index", "epoch"}
    assert set(off.train(range(9))) == set(off.train(range(3, 3))) == names
    parts = [next(some.evaluate("test", rank=0, world_size=1, batch=64)) for some in (off, on)]
    assert set(parts[1]) == names
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_empty_share_gives_one_stand_in(dtype):
    batch = loader(Augment(mixup=1, cutmix=1), dtype=dtype).train(range(30, 30), window=range(0, 31))
    assert {name: len(tensor) for name, tensor in batch.items()} == dict.fromkeys(
        ("image", "label", "index", "epoch", "label2", "share"), 1
    )
    assert batch["image"].isfinite().all() and batch["image"].dtype == dtype
    assert batch["share"].dtype == torch.promote_types(dtype, torch.float32)


def mixed(n, *, side=12, **kinds):
    """n samples that show 1 where they are themselves and 0 where they are their partner."""
    index, epoch = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    own, other = torch.ones(n, 2, side, side, dtype=torch.float64), torch.zeros(n, 2, side, side, dtype=torch.float64)
    return mix_images(own, other, config=Augment(**kinds), seed=1, epoch=epoch, index=index)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_shares_are_beta_distributed(alpha):
    n = 20_000
    image, share = mixed(n, side=1, mixup=alpha)
    assert torch.equal(image[:, 0, 0, 0], share)
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(share.mean() - 0.5) < 4 * (variance / n) ** 0.5
    assert share.var() == pytest.approx(variance, rel=0.04)


def test_cutmix_shares_are_the_pixels_and_half_are_of_each_kind():
    image, share = mixed(4000, cutmix=1.0)
    assert (image.flatten(1).mean(1) - share).abs().max() < 1e-15
    assert set(image.unique().tolist()) == {0.0, 1.0}
    pasted = image.mean((0, 1))
    torch.testing.assert_close(pasted, pasted.flip(0, 1), rtol=0, atol=0.05)  # boxes have no favourite side
    both, _ = mixed(4000, mixup=1.0, cutmix=1.0)
    boxes = ((both == 0) | (both == 1)).flatten(1).all(1)
    assert abs(boxes.double().mean() - 0.5) < 4 * 0.5 / 4000**0.5
