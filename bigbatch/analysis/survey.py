"""What a recipe will feed to its model: how much of what, what is there twice, how fast it is read, how it looks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, count
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bigbatch.data import SPLITS, Batch, Loader, Preprocessing, Split, permute
from bigbatch.keyed import fold
from bigbatch.train import fingerprints

CONTENT = ("image", "input_ids")
"""Columns that tell whether two samples are the same; where there is none, all of them do."""
_AT_ONCE, _SECONDS, _BATCHES, _SHOWN = 256, 2.0, 3, 16


@dataclass
class Survey:
    """``read`` of each part's ``samples`` were read: ``columns``, dtype and shape of a sample; ``classes``, how many of
    each, by part and name; ``unreadable``, what could not be read, and why; ``duplicates``, pairs of numbers of samples
    with the same content, by the parts that they are in.

    statistics: what preprocessing subtracts and divides by, in the values that are stored; by channel, or the least and
    the largest of more than 16. inputs: of float columns, as the model gets them, over the first micro batch.
    samples_per_second: of training batches, with the recipe's workers.
    """

    samples: dict[Split, int] = field(default_factory=dict)
    read: dict[Split, int] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    classes: dict[Split, dict[str, int]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    duplicates: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    statistics: dict[str, list[float]] = field(default_factory=dict)
    inputs: dict[str, dict[str, float]] = field(default_factory=dict)
    samples_per_second: float = 0.0


def survey(
    loader: Loader, preprocessing: Preprocessing | None, *, samples: int | Literal["all"], seed: int, micro: int
) -> Survey:
    """Read ``samples`` of each part, which ``seed`` picks, as for evaluation, and batches of ``micro`` as for training.

    Raises `DataError` where training can read nothing.
    """
    found, prints = Survey(), {}
    loader.reader.problems.clear()
    for split in SPLITS:
        prints[split] = _read(found, loader, split, samples=samples, seed=seed)
    found.unreadable = dict(loader.reader.problems)
    for pair in combinations_with_replacement(SPLITS, 2):
        if same := _same(prints[pair[0]], prints[pair[1]]):
            found.duplicates[" and ".join(dict.fromkeys(pair))] = same
    if preprocessing:
        scale, shift = preprocessing.state["scale"], preprocessing.state["shift"]
        for name, values in (("subtracted", -shift / scale), ("divided by", 1 / scale)):
            flat = values.flatten()
            found.statistics[name] = (flat if len(flat) <= _SHOWN else torch.stack(flat.aminmax())).tolist()
    found.inputs, found.samples_per_second = _rate(loader, micro)
    return found


def _read(found: Survey, loader: Loader, split: Split, *, samples: int | Literal["all"], seed: int) -> dict[int, int]:
    """Look at samples of a part; the fingerprint of each, by its number."""
    size, spec = len(loader.dataset.part(split)), loader.dataset.spec
    wanted = size if samples == "all" else min(samples, size)
    chosen = torch.from_numpy(np.sort(permute(np.arange(wanted), size, fold(seed, -3))))
    labels, prints = Counter[int](), dict[int, int]()
    for rows in chosen.split(_AT_ONCE):  # type: ignore[no-untyped-call]
        batch = loader.reader.start(split, rows)()
        index = batch.pop("index", rows)
        if len(index):
            found.columns |= {name: _what(column) for name, column in batch.items()}
            prints |= zip(index.tolist(), _fingerprints(batch).tolist(), strict=True)
            labels.update(batch["label"].tolist() if spec.classes and "label" in batch else ())
    found.samples[split], found.read[split] = size, len(prints)
    if labels:
        names = spec.names or tuple(map(str, range(spec.classes)))
        found.classes[split] = {name: labels[number] for number, name in enumerate(names)}
    return prints


def _what(column: Tensor) -> str:
    return " ".join([str(column.dtype).removeprefix("torch."), *[str(tuple(column.shape[1:]))] * (column.dim() > 1)])


def _fingerprints(batch: Batch) -> Tensor:
    """int64 (B,): of each sample's content."""
    columns = [batch[name] for name in CONTENT if name in batch] or [batch[name] for name in sorted(batch)]
    return fingerprints(torch.stack([fingerprints(column.reshape(len(column), -1)) for column in columns], 1))


def _same(ours: dict[int, int], theirs: dict[int, int]) -> list[tuple[int, int]]:
    """Numbers of equal samples of two parts, or of one part and itself: each with the first that it is equal to."""
    first: dict[int, int] = {}
    for number, fingerprint in ours.items():
        first.setdefault(fingerprint, number)
    pairs = [(first[fingerprint], number) for number, fingerprint in theirs.items() if fingerprint in first]
    return pairs if ours is not theirs else [(a, b) for a, b in pairs if a != b]


def _rate(loader: Loader, micro: int) -> tuple[dict[str, dict[str, float]], float]:
    """Statistics of the first batch's floats, and training samples a second once reading is under way."""

    def batches() -> Iterator[range]:
        return (range(micro * number, micro * (number + 1)) for number in count())

    loader.follow((positions, positions) for positions in batches())
    inputs, begun, seconds = dict[str, dict[str, float]](), 0.0, 0.0
    for number, positions in enumerate(batches()):
        batch = loader.train(positions)
        if not number:  # which waits for processes to start
            floats = {name: column.double() for name, column in batch.items() if column.is_floating_point()}
            for name, x in floats.items():
                numbers = {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()}
                inputs[name] = {key: float(value) for key, value in numbers.items()}
            begun = time.perf_counter()
        elif number >= _BATCHES and (seconds := time.perf_counter() - begun) > _SECONDS:
            break
    loader.follow(iter(()))
    return inputs, number * micro / seconds
