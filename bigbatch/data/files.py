"""Images in files: class folders, tar shards, datasets of the Hugging Face library."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigbatch.config.data import Transform
from bigbatch.config.models import Folder, Hub, Shards
from bigbatch.keyed import fold
from bigbatch.spec import Spec

from .base import Batch, DataError, Dataset, digest_of
from .decode import Encoded, Unreadable
from .listing import Listing, list_other, list_train
from .sampler import permute
from .transforms import Transforms, keyed_generator, sample_seeds

BAD = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.ELOOP}
"""Errors of a file that is no image. Any other may be gone the next time, and passing over would make another run."""


class Source(Protocol):
    """Encoded images by number, wherever they are; pickled for the processes that read ahead."""

    @property
    def labels(self) -> Tensor:
        """int64 (N,)."""

    @property
    def digest(self) -> str:
        """Changes with which samples there are, their order and labels. Images are not read for it."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What messages call it."""

    def read(self, i: int) -> bytes:
        """The bytes of the image. Raises OSError or ValueError."""


class FolderSource:
    """Images in class folders."""

    def __init__(self, listing: Listing) -> None:
        self._root, self._classes = listing.root, listing.classes
        counts = [len(files) for files in listing.files]
        self.labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        # A tenth of what strings would cost to hold, and to send to each process that reads.
        self._files: NDArray[np.bytes_] = np.array(
            [os.fsencode(f) for files in listing.files for f in files], dtype="S"
        )

    @property
    def digest(self) -> str:
        return digest_of(self.labels.numpy().tobytes(), self._files.tobytes())

    def __len__(self) -> int:
        return len(self._files)

    def name(self, i: int) -> str:
        return os.path.join(self._root, self._classes[int(self.labels[i])], os.fsdecode(self._files[i]))

    def read(self, i: int) -> bytes:
        with open(self.name(i), "rb", buffering=0) as file:
            return file.read()


class EncodedPart:
    """A part whose images are decoded and transformed as they are asked for: uint8 (B, C, H, W).

    One that cannot be read raises `DataError`; or, with ``unreadable`` skip, is noted in ``problems`` and left out of
    an evaluation, and in training is replaced, image and label, by the first that can be read in an order of all images
    that its number keys, transformed as it would have been itself. So what a sample is depends on the files alone, and
    not one image stands in for all that a damaged shard has lost, but many do. Transforms for training are drawn by
    (``seed``, epoch, sample); ``evaluation`` ones are applied where ``gather`` gets no epoch.
    """

    def __init__(
        self,
        source: Source,
        *,
        train: Transforms,
        evaluation: Transforms,
        unreadable: Literal["fail", "skip"],
        seed: int,
    ) -> None:
        self.source, self.unreadable, self.seed = source, unreadable, seed
        self._train, self._evaluation = train, evaluation
        self.problems: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, index: Tensor, epoch: Tensor | None = None) -> Batch:
        transforms = self._evaluation if epoch is None else self._train
        image = torch.empty(len(index), *transforms.shape, dtype=torch.uint8)
        rows: list[int] = []
        found: list[int] = []
        with keyed_generator() as seed:
            for row, (i, key) in enumerate(zip(index.tolist(), sample_seeds(self.seed, index, epoch), strict=True)):
                for other in (i,) if epoch is None else self._candidates(i):
                    seed(key)
                    if (view := self._view(other, transforms)) is not None:
                        image[len(rows)] = view
                        rows.append(row)
                        found.append(other)
                        break
                else:
                    if epoch is not None:
                        raise DataError(f"none of {len(self)} images can be read, such as {self.source.name(i)}")
        return {"image": image[: len(rows)], "label": self.source.labels[found], "index": index[rows]}

    def _candidates(self, i: int) -> Iterator[int]:
        """Image i, then all of them in the order that i keys."""
        yield i
        for place in range(len(self)):
            yield int(permute(np.array([place]), len(self), fold(i))[0])

    def _view(self, i: int, transforms: Transforms) -> Tensor | None:
        """The transformed image, or None for one that is passed over."""
        try:
            encoded = Encoded(self._read(i), channels=transforms.shape[0])
            return transforms(encoded.height, encoded.width, load=encoded.decode)
        except Unreadable as error:
            if self.unreadable == "fail":
                raise DataError(
                    f"{self.source.name(i)}: cannot be read ({error}); mend or remove it, or pass over such "
                    "images with data.unreadable=skip"
                ) from error
            self.problems[self.source.name(i)] = str(error)
            return None
        except DataError as error:
            raise DataError(f"{self.source.name(i)}: {error}") from error

    def _read(self, i: int) -> bytes:
        try:
            return self.source.read(i)
        except DataError:
            raise
        except OSError as error:
            if error.errno in BAD:
                raise Unreadable(error.strerror or str(error)) from error
            raise DataError(f"cannot be read now ({error}); run again when that is well") from error
        except ValueError as error:
            raise Unreadable(str(error)) from error


def load_files(config: Folder | Shards | Hub, *, seed: int) -> Dataset:
    """The three parts; without ``data.test``, the validation images are the test part too.

    Raises ValueError for files, transforms or ``data.shape`` that do not go together; images are not read.
    """
    sources: Sequence[Source]
    match config:
        case Folder():
            sources, names = _folder(config)
        case Shards():
            from .shards import load_shards

            sources, names = load_shards(config)
        case Hub():
            from .hub import load_hub

            sources, names = load_hub(config)
    classes = _classes(config, sources, names)
    size = config.shape[1:]
    default: tuple[Transform, ...] = ({"RandomResizedCrop": {"size": size}},)
    steps = default if config.transforms is None else config.transforms
    train = Transforms(steps, shape=config.shape, key="data.transforms")
    larger = [side * 8 // 7 for side in size]
    # One number is that of the shorter side, and keeps what is round round.
    default = ({"Resize": {"size": larger[0] if size[0] == size[1] else larger}}, {"CenterCrop": {"size": size}})
    steps = default if config.eval_transforms is None else config.eval_transforms
    evaluation = Transforms(steps, shape=config.shape, key="data.eval_transforms")
    fit, held, last = (
        EncodedPart(source, train=train, evaluation=evaluation, unreadable=config.unreadable, seed=seed)
        for source in sources
    )
    digest = digest_of(repr(names).encode(), *(source.digest.encode() for source in sources))
    return Dataset(fit, held, last, Spec(config.shape, classes, names), digest=digest)


def _classes(config: Folder | Shards | Hub, sources: Sequence[Source], names: tuple[str, ...]) -> int:
    """How many there are: as many as have names, or as the training labels say."""
    parts = dict(zip(("train", "validation", "test"), sources, strict=True))
    for key, source in parts.items():
        if not len(source):
            raise ValueError(f"data.{key} = {getattr(config, key)!r}: there are no samples in it")
    classes = len(names) or int(sources[0].labels.max()) + 1
    if classes < 2:
        raise ValueError(f"data.train = {config.train!r}: all is of one class, there is nothing to learn from")
    for key, source in parts.items():
        if (largest := int(source.labels.max())) >= classes:
            raise ValueError(
                f"data.{key} = {getattr(config, key)!r}: has a sample of class {largest}, and there are {classes} "
                f"classes, from 0 on{'' if names else ' in training'}; label all parts alike"
            )
    return classes


def _folder(config: Folder) -> tuple[list[Source], tuple[str, ...]]:
    train, validation = list_train(config)
    test = validation
    if config.test is not None:
        test = list_other(config, config.test, key="data.test", classes=train.classes)
    return [FolderSource(listing) for listing in (train, validation, test)], train.classes
