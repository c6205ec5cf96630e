"""Transforms of single images, by the names of torchvision.transforms.v2, random by (seed, epoch, sample)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from bigbatch.config.data import Transform
from bigbatch.keyed import hashed

from .base import Batch, DataError, Dataset, Part

_DRAW = 12  # those before are augment.py's and mix.py's
_GAP = 2.0
"""Pixels decoded, along a side, for each that is wanted, as by PIL's ``thumbnail``: two photographs, brought to 32 to
224 pixels, then differed from what all of their pixels give by 1 of 255 in the mean, and by 2 with a gap of 1."""
_BLANK = torch.zeros(1, dtype=torch.uint8)
_MIXING = {"MixUp": "mixup", "CutMix": "cutmix"}


class Transforms:
    """What ``key``, ``data.transforms`` or ``data.eval_transforms``, makes of an image: uint8 of ``shape``, (C, H, W).

    Each step does what v2's own does after the same random numbers, but where the first one makes a quarter or less of
    an image's sides, a JPEG is decoded smaller, to at least twice the sides wanted, and a crop is rounded to the pixels
    that there are then. Raises ValueError for a name or arguments that torchvision does not have, and for steps that
    give an image of ``shape`` another shape or dtype.
    """

    def __init__(self, steps: Sequence[Transform], *, shape: tuple[int, ...], key: str) -> None:
        self.shape, self.key = shape, key
        self.steps = tuple(_build(step, key=key) for step in steps)
        blank = torch.zeros(shape, dtype=torch.uint8)
        with keyed_generator() as seed:
            seed(0)
            try:
                self(*shape[1:], load=partial(_whole, blank))
            except DataError as error:
                raise ValueError(str(error)) from error

    def __call__(self, height: int, width: int, *, load: Callable[[float], Tensor]) -> Tensor:
        """The image made of one of ``height`` × ``width`` pixels. ``load`` gives that one, uint8 (C, H, W), or one
        whose sides are up to so many times smaller as it is told. Raises `DataError` where a step fails.
        """
        box, reduction = _needed(self.steps, height, width)
        image = load(reduction)  # outside of the try: that it fails is no fault of the steps
        try:
            if box is not None:
                box = _scaled(box, image.shape[1] / height, image.shape[2] / width)
                image = self.steps[0].transform(image, box)
            for step in self.steps[0 if box is None else 1 :]:
                image = step(image)
        except Exception as error:
            raise DataError(f"{self.key}: fails on an image of {height} × {width} pixels ({error})") from error
        if not (isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape == self.shape):
            what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise DataError(
                f"{self.key}: makes {what.removeprefix('torch.')} of an image of {height} × {width} pixels, where the "
                f"model gets uint8 {self.shape}; resize and crop to that, and leave floats to data.preprocess"
            )
        return image


def _needed(steps: Sequence[Any], height: int, width: int) -> tuple[dict[str, int] | None, float]:
    """The box that the first step crops, if it does, and how many times smaller its input may be than the image."""
    first: Any = steps[0] if steps else None
    if type(first) is v2.RandomResizedCrop:
        box: dict[str, int] = first.make_params([_BLANK.expand(1, height, width)])
        return box, min(box["height"] / first.size[0], box["width"] / first.size[1]) / _GAP
    if type(first) is v2.Resize and first.size and first.max_size is None:
        return None, min(height / first.size[0], width / first.size[-1]) / _GAP
    return None, 1.0


def _scaled(box: dict[str, int], down: float, across: float) -> dict[str, int]:
    """The box in an image that is smaller by these factors."""
    top, left = round(box["top"] * down), round(box["left"] * across)
    bottom, right = round((box["top"] + box["height"]) * down), round((box["left"] + box["width"]) * across)
    return {"top": top, "left": left, "height": bottom - top, "width": right - left}


def _build(step: Transform, *, key: str) -> Any:
    name, arguments = (step, {}) if isinstance(step, str) else next(iter(step.items()), ("", {}))
    if not isinstance(step, str) and len(step) != 1:
        raise ValueError(f"{key}: {step}: give each transform an item of its own, such as - {{RandAugment: {{}}}}")
    if name in _MIXING:
        mixing = _MIXING[name]
        raise ValueError(f"{key}: {name}: mixes samples; set data.augment.{mixing} to its alpha instead")
    known = {n for n, c in vars(v2).items() if isinstance(c, type) and issubclass(c, v2.Transform)} - {"Transform"}
    if name not in known:
        near = get_close_matches(name, known) or sorted(known)
        raise ValueError(f"{key}: {name!r}: torchvision.transforms.v2 has none of that name; it has {', '.join(near)}")
    arguments = dict(arguments)
    if isinstance(arguments.get("transforms"), list):  # RandomApply, RandomChoice, RandomOrder
        arguments["transforms"] = [_build(inner, key=f"{key}: {name}") for inner in arguments["transforms"]]
    try:
        if isinstance(arguments.get("interpolation"), str):
            arguments["interpolation"] = InterpolationMode(arguments["interpolation"])
        return getattr(v2, name)(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {name}: {error}") from error


def sample_seeds(seed: int, index: Tensor, epoch: Tensor | None) -> list[int]:
    """h(seed, epoch, sample), a seed for each sample's transforms; in evaluation, those of epoch 0."""
    epoch = torch.zeros_like(index) if epoch is None else epoch
    return hashed(seed, epoch, index, _DRAW).tolist()


@contextmanager
def keyed_generator() -> Iterator[Callable[[int], Any]]:
    """What seeds torch's global generator of the CPU, whose numbers go on afterwards as if nothing had been."""
    state = torch.get_rng_state()
    try:
        yield torch.default_generator.manual_seed
    finally:
        torch.set_rng_state(state)


@dataclass(frozen=True, eq=False)
class TransformedPart:
    """A part whose images, uint8 (C, H, W), go through ``train`` when they are read for training, else through
    ``evaluation``."""

    part: Part
    train: Transforms
    evaluation: Transforms
    seed: int

    def __len__(self) -> int:
        return len(self.part)

    @property
    def problems(self) -> dict[str, str]:
        """Those of the part itself."""
        found: dict[str, str] = getattr(self.part, "problems", {})
        return found

    def gather(self, index: Tensor, epoch: Tensor | None = None) -> Batch:
        batch = self.part.gather(index, epoch)
        transforms = self.evaluation if epoch is None else self.train
        if not transforms.steps:
            return batch
        images = []
        with keyed_generator() as seed:
            seeds = sample_seeds(self.seed, batch.get("index", index), epoch)
            for image, key in zip(batch["image"], seeds, strict=True):
                seed(key)
                images.append(transforms(*image.shape[1:], load=partial(_whole, image)))
        return {**batch, "image": torch.stack(images)}


def _whole(image: Tensor, reduction: float) -> Tensor:
    return image


def transformed(dataset: Dataset, *, train: Sequence[Transform], evaluation: Sequence[Transform], seed: int) -> Dataset:
    """The dataset with transforms of its images; known statistics are theirs no more if evaluation has some."""
    if dataset.kind != "image":
        raise ValueError(f"data.transforms: are for images, and this dataset is of kind {dataset.kind!r}; remove them")
    chains = (
        Transforms(train, shape=dataset.spec.shape, key="data.transforms"),
        Transforms(evaluation, shape=dataset.spec.shape, key="data.eval_transforms"),
    )
    fit, held, last = (TransformedPart(p, *chains, seed) for p in (dataset.train, dataset.validation, dataset.test))
    dataset = replace(dataset, train=fit, validation=held, test=last)
    return replace(dataset, mean=None, std=None) if evaluation else dataset
