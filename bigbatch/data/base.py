"""What all datasets have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from bigbatch.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class DataError(ValueError):
    """Data that a run needs cannot be read; the message names the file and what to do."""


@contextmanager
def needs(extra: str, package: str) -> Iterator[None]:
    """Imports of an optional package; ValueError that names its extra where it is missing."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{package} is not installed ({error}); pip install 'bigbatch[{extra}]'") from None


def digest_of(*content: bytes) -> str:
    """SHA-256 of these, and of where each ends."""
    return hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in content)).hexdigest()


class Part(Protocol):
    """Samples that can be had by number, in any process: a part is pickled for those that read ahead."""

    def __len__(self) -> int: ...

    def gather(self, index: Tensor, epoch: Tensor | None = None) -> Batch:
        """The samples ``index``, int64 (B,), as tensors of the CPU whose first dimension is B; of images, ``image``
        (B, C, H, W), uint8, and of classes, ``label`` int64 (B,).

        ``epoch``, int64 (B,): for training, where what is random about a sample follows from (seed, epoch, sample).
        None: for evaluation, where nothing is; samples that cannot be read may then be left out, if the column
        ``index`` has those that are there. Raises `DataError`.
        """


@dataclass(frozen=True, eq=False)
class TensorPart:
    """A part that lies in memory: columns by name, of N rows each."""

    columns: Batch

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def gather(self, index: Tensor, epoch: Tensor | None = None) -> Batch:
        return {name: column.index_select(0, index) for name, column in self.columns.items()}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three parts, and what they have in common.

    kind: what a batch still goes through: images are augmented and preprocessed, text is masked, anything else is
    plain. mean, std: of the training part's pixels / 255, float64 (C,), where they are known beforehand. tokenizer: of
    text, the content of tokenizer.json. digest: changes with the samples, where they are made of something that a
    recipe only names; a run goes on with the same alone.
    """

    train: Part
    validation: Part
    test: Part
    spec: Spec
    kind: Literal["image", "text", "plain"] = "image"
    mean: Tensor | None = None
    std: Tensor | None = None
    tokenizer: str = ""
    digest: str = ""

    def part(self, split: Split) -> Part:
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]
