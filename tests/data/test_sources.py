from __future__ import annotations

import gzip
import os

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits

from bigbatch.config.models import Digits, Idx, Synthetic
from bigbatch.data import load_data


def idx(path, **options):
    return Idx(name="idx", path=str(path), **{"validation": 5, **options})


def everything(part):
    return tuple(part.gather(torch.arange(len(part))).values())


# ------------------------------------------------------------------------------------------------ digits


def test_digits_parts_are_split_by_class_and_cover_the_file_once():
    data = load_data(Digits(name="digits"), seed=0)
    raw = load_digits()
    rows = {"train": [], "validation": [], "test": []}
    for digit in range(10):
        for place, row in enumerate(np.flatnonzero(raw.target == digit)):
            rows[{3: "validation", 4: "test"}.get(place % 5, "train")].append(row)
    assert sorted(row for members in rows.values() for row in members) == list(range(1797))
    for name, members in rows.items():
        images, labels = everything(getattr(data, name))
        members = sorted(members)
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert np.array_equal(images[:, 0].numpy(), np.rint(raw.images[members] * 255 / 16))
        assert np.array_equal(labels.numpy(), raw.target[members])
    assert (len(data.train), len(data.validation), len(data.test)) == (1085, 357, 355)
    assert (data.spec.shape, data.spec.classes) == ((1, 8, 8), 10)


def test_statistics_are_those_of_the_training_part():
    data = load_data(Digits(name="digits"), seed=0)
    pixels = everything(data.train)[0].double() / 255
    assert data.mean.dtype == data.std.dtype == torch.float64
    torch.testing.assert_close(data.mean, pixels.mean((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(data.std, pixels.std((0, 2, 3), correction=0), rtol=1e-12, atol=0)


def test_digits_with_a_wrong_size():
    with pytest.raises(ValueError, match=r"data\.size = 10: the data has 1085"):
        load_data(Digits(name="digits", size=10), seed=0)


# --------------------------------------------------------------------------------------------------- idx


@pytest.mark.parametrize("packed", [False, True])
def test_idx_parts(plant, packed):
    data = load_data(idx(plant(packed=packed), size=15), seed=0)
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (20, 6, 5)), rng.integers(0, 256, (8, 6, 5))
    for part, pixels, labels in (
        (data.train, train[:15], np.arange(15) % 4),
        (data.validation, train[15:], np.arange(15, 20) % 4),
        (data.test, test, np.arange(8) % 4),
    ):
        images, numbers = everything(part)
        assert np.array_equal(images[:, 0].numpy(), pixels)
        assert np.array_equal(numbers.numpy(), labels)
    assert (data.spec.shape, data.spec.classes) == ((1, 6, 5), 4)


def test_no_held_out_image_enters_the_statistics(plant, encode):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 5))
    changed = np.concatenate([pixels[:15], 255 - pixels[15:]])
    one = load_data(idx(plant("one", train_images=encode(pixels))), seed=0)
    other = load_data(idx(plant("other", train_images=encode(changed), test_images=encode(pixels[:8]))), seed=0)
    assert torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std)
    np.testing.assert_allclose(float(one.mean), pixels[:15].mean() / 255, rtol=1e-12)
    np.testing.assert_allclose(float(one.std), pixels[:15].std() / 255, rtol=1e-12)


def test_a_class_that_only_validates_still_counts(plant, encode):
    data = load_data(idx(plant(train_labels=encode([0, 1] * 9 + [2, 0]), test_labels=encode([0, 1] * 4))), seed=0)
    assert data.spec.classes == 3


@pytest.mark.parametrize(
    ("name", "shape", "values", "found"),
    [
        ("train_images", (19, 6, 5), None, "train-labels-idx1-ubyte.gz: found 20 labels, expected 19"),
        ("test_labels", (9,), None, "t10k-labels-idx1-ubyte.gz: found 9 labels, expected 8"),
        (
            "test_images",
            (8, 5, 5),
            None,
            "t10k-images-idx3-ubyte.gz: found images of 5 × 5, expected 6 × 5 as in train",
        ),
        ("train_images", (20, 6), None, "train-images-idx3-ubyte.gz: found magic 00000802, expected 00000803"),
        ("train_images", (20, 6, 0), None, "train-images-idx3-ubyte.gz: found 20 images of 6 × 0, expected some"),
        ("train_labels", (20,), 1, r"train-labels-idx1-ubyte.gz: found labels \[1\], expected all from 0"),
        ("train_labels", (20,), 0, r"train-labels-idx1-ubyte.gz: found labels \[0\], expected all from 0"),
        ("test_labels", (8,), 4, "t10k-labels-idx1-ubyte.gz: found label 4, expected 0 to 3 as in train-labels"),
        ("train_images", (20, 6, 5), 7, "train-images-idx3-ubyte.gz: every pixel of the training images has one value"),
    ],
)
def test_idx_files_that_contradict_each_other(plant, encode, name, shape, values, found):
    array = np.random.default_rng(1).integers(0, 4, shape) if values is None else np.full(shape, values)
    folder = plant(**{name: encode(array)})
    with pytest.raises(ValueError, match=f"{folder}/{found}"):
        load_data(idx(folder), seed=0)


@pytest.mark.parametrize(("change", "found"), [(-1, "599 values"), (1, "601 values")])
def test_idx_file_of_the_wrong_length(plant, encode, change, found):
    whole = encode(np.ones((20, 6, 5)))
    folder = plant(train_images=whole[:change] if change < 0 else whole + b"\0")
    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte\.gz: found {found}, expected 600 for the extents"):
        load_data(idx(folder), seed=0)


def test_idx_archive_cut_off(plant, encode):
    folder = plant()
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        load_data(idx(folder), seed=0)


def test_idx_not_found_even_if_a_size_is_given(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path = .*no folder has the four idx files"):
        load_data(idx(tmp_path / "none", size=100), seed=0)


# ---------------------------------------------------------------------------------------------- download


@pytest.mark.parametrize(("name", "kind"), [("fashion_mnist", "FashionMNIST"), ("mnist", "MNIST")])
def test_download_goes_through_torchvision_into_the_first_path(plant, tmp_path, monkeypatch, name, kind):
    asked = []

    def fetch(self):
        asked.append(type(self).__name__)
        folder = plant(os.path.relpath(self.raw_folder, tmp_path), train=60_000, size=(1, 1), packed=False)
        for file in folder.iterdir():  # torchvision keeps the archives beside what it unpacked
            (folder / f"{file.name}.gz").write_bytes(gzip.compress(b"older"))

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fetch)
    monkeypatch.setattr(torchvision.datasets.MNIST, "_load_data", lambda self: (None, None))
    monkeypatch.setattr(torchvision.datasets.MNIST, "_check_exists", lambda self: True)
    config = Idx(name="idx", path=(str(tmp_path / "first"), str(tmp_path / "second")), download=name)
    data = load_data(config, seed=0)
    assert len(data.train) == 55_000 and len(data.validation) == 5000
    assert (tmp_path / "first" / kind / "raw").is_dir() and not (tmp_path / "second").exists()
    load_data(config, seed=0)
    assert asked == [kind]  # once


def test_download_is_not_tried_where_the_files_are(plant, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: pytest.fail("asked for the network"))
    assert len(load_data(idx(plant(), download="mnist"), seed=0).train) == 15


@pytest.mark.parametrize("error", [RuntimeError("no\nroute"), OSError("no route")])
def test_download_that_fails(tmp_path, monkeypatch, error):
    def fetch(self):
        raise error

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fetch)
    with pytest.raises(ValueError, match=rf"data\.download = 'mnist': fetching into {tmp_path} failed \(no route\)"):
        load_data(idx(tmp_path, download="mnist"), seed=0)


# --------------------------------------------------------------------------------------------- synthetic


def synthetic(**options):
    return Synthetic(name="synthetic", **{"size": 300, "shape": (3, 9, 11), "classes": 7, "evaluation": 40, **options})


def test_synthetic_images_are_a_function_of_seed_and_number():
    data, again, other = (load_data(synthetic(), seed=seed) for seed in (1, 1, 2))
    images, labels = everything(data.train)
    assert images.dtype == torch.uint8 and images.shape == (300, 3, 9, 11)
    assert torch.equal(labels.unique(), torch.arange(7))
    some = torch.tensor([299, 0, 17, 17])
    assert torch.equal(again.train.gather(some)["image"], images[some])
    assert torch.equal(again.train.gather(some)["label"], labels[some])
    assert not torch.equal(other.train.gather(some)["image"], images[some])


def test_synthetic_parts_share_no_image():
    data = load_data(synthetic(), seed=0)
    images = torch.cat([everything(part)[0] for part in (data.train, data.validation, data.test)])
    assert len(images) == 380 == len({image.numpy().tobytes() for image in images})


def test_synthetic_statistics_are_near_the_truth():
    data = load_data(synthetic(size=2000, classes=200, shape=(2, 16, 16)), seed=0)
    pixels = everything(data.train)[0].double() / 255
    torch.testing.assert_close(data.mean, pixels.mean((0, 2, 3)), rtol=0.02, atol=0)
    torch.testing.assert_close(data.std, pixels.std((0, 2, 3)), rtol=0.02, atol=0)


def test_synthetic_classes_can_be_told_apart():
    data = load_data(synthetic(size=700), seed=0)
    images, labels = (t.double() for t in everything(data.train))
    held, truth = everything(data.test)
    centres = torch.stack([images[labels == k].mean(0) for k in range(7)]).flatten(1)
    guess = torch.cdist(held.double().flatten(1), centres).argmin(1)
    assert (guess == truth).double().mean() > 0.95


def test_synthetic_of_imagenet_size_makes_only_what_is_asked_for():
    data = load_data(synthetic(size=1_281_167, shape=(3, 224, 224), classes=1000), seed=0)
    assert len(data.train) == 1_281_167
    images, labels = data.train.gather(torch.tensor([1_281_166, 3])).values()
    assert images.shape == (2, 3, 224, 224) and labels.tolist() == [166, 3]
    assert data.train.patterns.numel() + data.train.noise.numel() < 5_000_000
