"""Statistics in any pieces, and the affine map that they make, against a textbook and scikit-learn."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from bigbatch.config.models import Digits, Idx, Preprocess
from bigbatch.data import Moments, Preprocessing, Statistics, fit_preprocess, load_data
from bigbatch.data.preprocess import _EXACT
from reference.preprocess import preprocess as textbook

CPU, FASHION = torch.device("cpu"), Path("/usr/share/datasets/fashion-mnist")
SECOND = st.sampled_from(["variance", "covariance"])


def moments(images, *, second="covariance"):
    found = Moments(images[0].numel(), second=second, device=CPU)
    found.update(images)
    return found


def fitted(images, config, *, dtype=torch.float64):
    second = "variance" if config.whiten == "none" else "covariance"
    state = fit_preprocess(config, Statistics.of(moments(images, second=second), tuple(images.shape[1:])))
    return Preprocessing(state, device=CPU, dtype=dtype)


def images(seed, n=40, shape=(3, 4, 5)):
    """uint8, of which every channel has its own range, and a corner never varies."""
    rng = np.random.default_rng(seed)
    some = rng.integers(0, [[[60]], [[100]], [[256]]][: shape[0]], (n, *shape), dtype=np.uint8)
    some[:, :, 0, 0] = 200
    return torch.from_numpy(some)


@pytest.fixture(scope="module")
def digits():
    return load_data(Digits(name="digits"), seed=0)


# ------------------------------------------------------------------------------------------------- moments


@settings(max_examples=60)
@given(st.data(), SECOND, st.integers(1, 30), st.integers(0, 9))
def test_sums_are_exact_and_the_same_in_any_pieces_and_order(data, second, n, seed):
    rows = images(seed, n)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    found = Moments(60, second=second, device=CPU)
    for piece in data.draw(st.permutations(torch.tensor_split(rows, cuts))):
        if len(piece):
            found.update(piece)
    whole = moments(rows, second=second)
    assert (found.n, found.low, found.high) == (whole.n, whole.low, whole.high) == (n, rows.min(), rows.max())
    assert torch.equal(found.total, whole.total) and torch.equal(found.square, whole.square)
    exact = rows.flatten(1).numpy().astype(object)
    sums = (n * exact.T @ exact - np.outer(exact.sum(0), exact.sum(0))).astype(float) / n**2
    assert np.array_equal(whole.second.numpy(), sums if second == "covariance" else sums.diagonal())


@pytest.mark.parametrize("value", [0, 255])
def test_a_whole_block_of_extremes_is_still_exact(value):
    rows = torch.full((2 * _EXACT + 5, 3), value, dtype=torch.uint8)
    rows[-1, 0] = 1
    found = moments(rows)
    away = rows.double() - 128
    assert torch.equal(found.square, away.T @ away) and torch.equal(found.total, away.sum(0))


# ------------------------------------------------------------------------------------------ the affine map

AFFINE = list(product(["unit", "symmetric", "minmax"], *[["none", "all", "channel", "feature"]] * 2))


def test_rescale_centre_and_scale_are_the_textbook_s():
    some = images(1)
    for rescale, center, scale in AFFINE:
        config = Preprocess(rescale=rescale, center=center, scale=scale)
        found = fitted(some, config)(some.double())
        np.testing.assert_allclose(found, textbook(some.numpy(), config), atol=1e-9, err_msg=repr(config))


def test_the_default_is_mean_and_deviation_of_the_channels_to_the_last_bit(digits):
    known = Statistics(digits.mean[:, None, None], digits.std[:, None, None] ** 2)
    state = fit_preprocess(Preprocess(), known)
    assert state.keys() == {"scale", "shift"}
    assert torch.equal(state["scale"].flatten(), 1 / (255 * digits.std))
    assert torch.equal(state["shift"].flatten(), -digits.mean / digits.std)


@pytest.mark.parametrize(("whiten", "keep"), [*product(["pca", "zca"], [None, 30, 0.9])])
def test_whitened_training_images_have_the_identity_for_covariance(digits, whiten, keep):
    config = Preprocess(whiten=whiten, eps=0, keep=keep)
    train = digits.train.images
    found = fitted(train, config)(train.double())
    assert found.shape[1:] == ((1, 8, 8) if whiten == "zca" else (found.shape[1],))
    rows = found.flatten(1)
    covariance = rows.T @ rows / len(rows)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    kept = 30 if keep == 30 else int((values > 0.5).sum())
    assert rows.mean(0).abs().max() < 1e-6
    torch.testing.assert_close(values[:kept], torch.ones(kept, dtype=torch.float64), rtol=0, atol=1e-6)
    assert not (values[kept:].abs() > 1e-6).any()
    if whiten == "pca":
        assert rows.shape[1] == kept
        torch.testing.assert_close(covariance, torch.eye(kept, dtype=torch.float64), rtol=0, atol=1e-6)
    if keep == 0.9:
        explained = np.cumsum(PCA().fit((train / 255).flatten(1).double()).explained_variance_ratio_)
        assert explained[kept - 2] < 0.9 <= explained[kept - 1]


def test_whitening_is_scikit_learn_s_but_for_signs_and_the_number_that_divides(digits):
    train = digits.train.images
    found = fitted(train, Preprocess(whiten="pca", eps=0, keep=40))(train.double()).numpy()
    n, rows = len(train), (train.double() / 255 / digits.std).flatten(1).numpy()
    theirs = PCA(40, whiten=True, svd_solver="full").fit_transform(rows) * (n / (n - 1)) ** 0.5
    signs = np.sign((found * theirs).sum(0))
    np.testing.assert_allclose(found * signs, theirs, atol=1e-6)


@pytest.mark.parametrize("whiten", ["pca", "zca"])
def test_whitening_with_a_regulariser_is_the_textbook_s(whiten):
    some = images(2, n=200)
    config = Preprocess(whiten=whiten, eps=0.1, keep=20, scale="feature", rescale="minmax")
    found, expected = fitted(some, config)(some.double()).numpy(), textbook(some.numpy(), config)
    signs = np.sign((found * expected).sum(0)) if whiten == "pca" else 1
    np.testing.assert_allclose(found * signs, expected, atol=1e-9)


def test_no_sample_s_bits_depend_on_its_batch_nor_on_autocast(digits):
    train = digits.train.images[:300]
    for dtype in (torch.float32, torch.float64):
        apply = fitted(train, Preprocess(whiten="zca"), dtype=dtype)
        whole = apply(train.to(dtype))
        for size in (1, 7, 64, 150):
            assert torch.equal(torch.cat([apply(batch.to(dtype)) for batch in train.split(size)]), whole)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(apply(train.to(dtype)), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whiten": "pca", "keep": 58}, r"data\.preprocess\.keep = 58: .* vary in 57 directions only"),
        ({"rescale": "minmax"}, r"data\.preprocess\.rescale = minmax: every value .* is 7"),
        ({"scale": "all"}, r"data\.preprocess\.scale = all: .*one value"),
        ({"scale": "channel"}, r"data\.preprocess\.scale = channel: .*one value"),
    ],
)
def test_what_does_not_vary_is_named(options, message):
    some = images(0, n=100) if "whiten" in options else torch.full((4, 3, 2, 2), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        fitted(some, Preprocess(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"whiten": "zca", "center": "channel"},
        {"whiten": "pca", "center": "none"},
        {"keep": 5},
        {"eps": 0.1},
        {"whiten": "pca", "keep": 1.0},
        {"whiten": "pca", "keep": 0},
    ],
)
def test_settings_that_contradict_each_other(options):
    with pytest.raises(ValueError):
        Preprocess(**options)


def test_vectors_are_not_mixed():
    with pytest.raises(ValueError, match=r"pca gives vectors, and data\.augment\.mixup"):
        Digits(name="digits", preprocess={"whiten": "pca"}, augment={"mixup": 0.2})
    Digits(name="digits", preprocess={"whiten": "zca"}, augment={"mixup": 0.2})


def test_whitening_centres_by_feature_unless_told_otherwise():
    config = Preprocess(whiten="zca")
    assert config.center == "feature"
    assert Preprocess.model_validate(config.model_dump()) == config and Preprocess().center == "channel"


@pytest.mark.cluster
@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_zca_of_fashion_mnist():
    train = load_data(Idx(name="idx", path=str(FASHION)), seed=0).train.images
    apply = fitted(train, Preprocess(whiten="zca", eps=0))
    total = torch.zeros(784, 784, dtype=torch.float64)
    for batch in train.split(5000):
        rows = apply(batch.double()).flatten(1)
        total += rows.T @ rows
    torch.testing.assert_close(total / len(train), torch.eye(784, dtype=torch.float64), rtol=0, atol=1e-6)
