"""Datasets: scikit-learn's digits, idx files such as MNIST's, and images made up on demand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bigbatch.config.models import CustomData, Data, Digits, Folder, Hub, Idx, Shards, Synthetic, Text
from bigbatch.keyed import fold, hashed
from bigbatch.spec import Spec

from .base import Batch, Dataset
from .listing import listed
from .size import (
    TEST_FILES,
    TORCHVISION,
    TRAIN_FILES,
    expect,
    find_file,
    find_folder,
    folders,
    not_found,
    read_idx,
    size_of,
)


@dataclass(frozen=True, eq=False)
class MemoryPart:
    """A part that lies in memory: images uint8 (N, C, H, W), labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: Tensor, epoch: Tensor | None = None) -> Batch:
        return {"image": self.images.index_select(0, index), "label": self.labels.index_select(0, index)}


@dataclass(frozen=True, eq=False)
class SyntheticPart:
    """Images that exist when asked for: sample i, counted from ``first``, is of class i mod K and shows the sum of the
    class's pattern (4 × 4 fields, each 0 … 128 in each channel) and of a window of the noise (0 … 127) that a hash of i
    picks. Costs no memory per sample. patterns: uint8 (K, C, 4, W); noise: uint8, flat.
    """

    size: int
    first: int
    height: int
    seed: int
    patterns: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return self.size

    def gather(self, index: Tensor, epoch: Tensor | None = None) -> Batch:
        index = index + self.first
        label = index % len(self.patterns)
        rows = torch.arange(self.height) * 4 // self.height
        signal = self.patterns.index_select(0, label).index_select(2, rows)
        windows = self.noise.unfold(0, signal[0].numel(), 1)
        noise = windows.index_select(0, hashed(self.seed, index) % len(windows)).view_as(signal)
        return {"image": signal + noise, "label": label}


def load_data(config: Data, *, seed: int) -> Dataset:
    """The dataset that ``config`` names; ``seed`` makes the synthetic one.

    With ``data.download`` files are written, so one process calls it before the others. Raises ValueError if files
    are missing, damaged or contradict each other or ``data.size``.
    """
    match config:
        case Digits():
            dataset = _digits()
        case Idx():
            dataset = _idx(config)
        case Synthetic():
            dataset = _synthetic(config, seed=seed)
        case Folder() | Shards() | Hub():
            from .files import load_files

            dataset = load_files(config, seed=seed)
        case Text():
            from .text import load_text

            dataset = load_text(config)
        case CustomData():
            from .custom import load_custom

            dataset = load_custom(config, seed=seed)
    if not isinstance(config, CustomData):  # whose size is the plan's, or an error
        size = size_of(config)  # which has its say on data.size
        assert len(dataset.train) == size
        listed.cache_clear()  # a path for each image, which nobody asks for any more
    if isinstance(config, Digits | Idx | Synthetic | CustomData) and (config.transforms or config.eval_transforms):
        from .transforms import transformed

        return transformed(dataset, train=config.transforms, evaluation=config.eval_transforms, seed=seed)
    return dataset


def _in_memory(train: MemoryPart, validation: MemoryPart, test: MemoryPart, *, classes: int, name: str) -> Dataset:
    values = torch.arange(256, dtype=torch.float64) / 255
    channels = train.images.transpose(0, 1).flatten(1)
    share = torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).double() / channels.shape[1]
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    if not std.all():
        raise ValueError(f"{name}: every pixel of the training images has one value, there is nothing to learn from")
    _, c, h, w = train.images.shape
    return Dataset(train, validation, test, Spec((c, h, w), classes), mean=mean, std=std)


def _digits() -> Dataset:
    """1,797 digits, 1 × 8 × 8; of each class, in the file's order, every fifth tests, the one before it validates."""
    package = find_spec("sklearn")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if file.is_file():
        table = np.loadtxt(file, delimiter=",")
    else:  # importing all of scikit-learn takes seconds in every process
        from sklearn.datasets import load_digits

        table = np.column_stack(load_digits(return_X_y=True))
    values = torch.from_numpy(table)
    images = values[:, :-1].mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = values[:, -1].long()
    place = torch.empty_like(labels)  # within the class
    for digit in range(10):
        place[labels == digit] = torch.arange(int((labels == digit).sum()))
    test, validation = place % 5 == 4, place % 5 == 3
    train, held, last = (MemoryPart(images[m], labels[m]) for m in (~(test | validation), validation, test))
    return _in_memory(train, held, last, classes=10, name="digits")


def _idx(config: Idx) -> Dataset:
    if find_folder(config) is None and config.download is not None:
        _download(config)
    folder = find_folder(config)
    if folder is None:
        raise not_found(config)
    train_files, test_files = ([find_file(folder, name) for name in names] for names in (TRAIN_FILES, TEST_FILES))
    train, test = (_read_part(images, labels) for images, labels in (train_files, test_files))
    sizes = [" × ".join(map(str, part.images.shape[2:])) for part in (test, train)]
    expect(sizes[0] == sizes[1], test_files[0], f"images of {sizes[0]}", f"{sizes[1]} as in {train_files[0].name}")
    counts = torch.bincount(train.labels)
    labels, top = counts.nonzero().flatten().tolist(), int(test.labels.max())
    expect(len(labels) == len(counts) > 1, train_files[1], f"labels {labels}", "all from 0 to the highest, at least 2")
    expect(top < len(counts), test_files[1], f"label {top}", f"0 to {len(counts) - 1} as in {train_files[1].name}")
    cut = size_of(config)
    fit, validation = (MemoryPart(train.images[s], train.labels[s]) for s in (slice(cut), slice(cut, None)))
    return _in_memory(fit, validation, test, classes=len(counts), name=str(train_files[0]))


def _read_part(images: Path, labels: Path) -> MemoryPart:
    (n, h, w), pixels = read_idx(images, dimensions=3)
    (count,), numbers = read_idx(labels, dimensions=1)
    expect(count == n, labels, f"{count} labels", f"{n}, one for each image of {images.name}")
    expect(bool(pixels), images, f"{n} images of {h} × {w}", "some")
    # a bytearray, because torch warns of memory that it may not write to
    return MemoryPart(
        torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(n, 1, h, w),
        torch.frombuffer(bytearray(numbers), dtype=torch.uint8).long(),
    )


def _download(config: Idx) -> None:
    from torchvision import datasets

    assert config.download is not None
    target = folders(config)[0]
    try:
        getattr(datasets, TORCHVISION[config.download])(root=str(target), download=True)
    except (OSError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise ValueError(
            f"data.download = {config.download!r}: fetching into {target} failed ({message}); "
            "give data.path a folder that has the four idx files"
        ) from None


def _synthetic(config: Synthetic, *, seed: int) -> Dataset:
    c, h, w = config.shape
    generator = torch.Generator().manual_seed(fold(seed))
    fields = torch.randint(0, 129, (config.classes, c, 4, 4), dtype=torch.uint8, generator=generator)
    patterns = fields.index_select(3, torch.arange(w) * 4 // w)
    noise = torch.randint(0, 128, (c * h * w + 2**20,), dtype=torch.uint8, generator=generator)
    sizes = (config.size, config.evaluation, config.evaluation)
    train, validation, test = (SyntheticPart(n, sum(sizes[:i]), h, seed, patterns, noise) for i, n in enumerate(sizes))
    variance = (129**2 - 1 + 128**2 - 1) / 12  # of the two uniform terms, whose means add up to 64 + 63.5
    mean, std = (torch.full((c,), value / 255, dtype=torch.float64) for value in (127.5, math.sqrt(variance)))
    return Dataset(train, validation, test, Spec(config.shape, config.classes), mean=mean, std=std)
