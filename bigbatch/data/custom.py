"""The user's own datasets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigbatch.config.models import Augment, CustomData
from bigbatch.custom import load_target, told

from .base import SPLITS, Batch, DataError, Dataset, Part, Split

KEY = "data.target"


def load_custom(config: CustomData, *, seed: int) -> Dataset:
    """``target(seed=seed, **options)``, whose first samples are looked at, as every batch will be.

    Raises ValueError if the code is not allowed to run, fails, gives anything but a `Dataset`, or if the recipe asks
    for what samples of its kind do not go through.
    """
    make = load_target(config.target, key=KEY)
    with told(KEY, config.target, f"the call with seed={seed} and data.options = {config.options!r}"):
        dataset = make(seed=seed, **config.options)
    where = f"{KEY} = {config.target!r}"
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{where}: gives a {type(dataset).__name__}; return a bigbatch.data.Dataset")
    if dataset.kind == "text":
        raise ValueError(f"{where}: is of kind text, whose masks are options of data.name = text; give kind plain")
    if dataset.kind == "plain":
        _check_plain(config, where)
    transformed = config.transforms or config.eval_transforms
    image = None if dataset.kind == "plain" else () if transformed else dataset.spec.shape
    train, validation, test = (CustomPart(dataset.part(split), split, config.target, image) for split in SPLITS)
    first = torch.zeros(1, dtype=torch.int64)
    for part in (train, validation, test):
        if not len(part):
            raise ValueError(f"{where}: its {part.split} part has no sample; each part needs some")
        part.gather(first, first if part is train else None)
    return replace(dataset, train=train, validation=validation, test=test)


@dataclass(frozen=True, eq=False)
class CustomPart:
    """A part of the user's, each batch of which is looked at. Raises `DataError` that names it.

    image: the shape of its images, () where that is not known; None where it has none.
    """

    part: Part
    split: Split
    target: str
    image: tuple[int, ...] | None

    def __len__(self) -> int:
        with told(KEY, self.target, f"len() of its {self.split} part", error=DataError):
            return len(self.part)

    def gather(self, index: Tensor, epoch: Tensor | None = None) -> Batch:
        what = f"gather() of its {self.split} part"
        with told(KEY, self.target, f"{what} for samples {_some(index)}", error=DataError):
            batch = self.part.gather(index, epoch)
        if wrong := self._wrong(batch, len(index), training=epoch is not None):
            raise DataError(f"{KEY} = {self.target!r}: {what} gives {wrong}")
        return batch

    @property
    def problems(self) -> dict[str, str]:
        problems: dict[str, str] = getattr(self.part, "problems", {})
        return problems

    def _wrong(self, batch: Any, rows: int, *, training: bool) -> str | None:
        if not isinstance(batch, dict) or not all(isinstance(value, Tensor) for value in batch.values()):
            return f"{batch!r:.80}; return a dict of tensors"
        if not training and "index" in batch:
            rows = len(batch["index"])
        for name, column in batch.items():
            if column.device.type != "cpu" or column.shape[:1] != (rows,):
                return f"{name} {_what(column)}; return tensors of the CPU with a row for each of {rows} samples"
        if self.image is None:
            return None
        image = batch.get("image", torch.empty(0))
        if image.dtype == torch.uint8 and image.dim() == 4 and image.shape[1:] == (self.image or image.shape[1:]):
            return None
        shape = self.image or ("C", "H", "W")
        found = f"image {_what(image)}" if "image" in batch else "no image"
        return f"{found}; give images as uint8 (B, {', '.join(map(str, shape))}), or another kind than image"


def _what(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"


def _some(index: Tensor) -> str:
    return ", ".join(map(str, index[:3].tolist())) + (" …" if len(index) > 3 else "")


def _check_plain(config: CustomData, where: str) -> None:
    unused = {"augment": Augment(), "transforms": (), "eval_transforms": ()}
    for key, default in unused.items():
        if getattr(config, key) != default:
            raise ValueError(f"data.{key}: is for images, and {where} gives samples of kind plain; remove it")
