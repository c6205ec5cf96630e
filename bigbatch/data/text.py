"""Text as rows of tokens, read where they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigbatch.config.models import Text
from bigbatch.spec import Spec

from .base import Batch, Dataset
from .corpus import Corpus, corpus


class TextPart:
    """Rows of a file, mapped into memory: ``input_ids``, int64 (B, L); with ``pad``, the id that short rows are filled
    with, ``attention_mask`` too, int64 (B, L), 0 where that stands."""

    def __init__(self, path: Path, shape: tuple[int, int], dtype: str, pad: int | None = None) -> None:
        self._made = (path, shape, dtype, pad)
        self._rows, self._pad = np.memmap(path, dtype, "r", shape=shape), pad

    def __reduce__(self) -> tuple[Any, ...]:
        return TextPart, self._made  # without the rows, which another process maps for itself

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, index: Tensor, epoch: Tensor | None = None) -> Batch:
        tokens = torch.from_numpy(self._rows[index.numpy()].astype(np.int64))
        batch = {"input_ids": tokens}
        return batch if self._pad is None else {**batch, "attention_mask": (tokens != self._pad).long()}


def load_text(config: Text) -> Dataset:
    """The text that ``config`` names, tokenised if it was not yet. Raises ValueError as `corpus.corpus` does."""
    found = corpus(config)
    spec = Spec((config.length,), found.vocabulary, special=found.special)
    train, validation, test = (_rows(found, split, packing=config.packing) for split in ("train", "validation", "test"))
    return Dataset(train, validation, test, spec, kind="text", tokenizer=found.tokenizer, digest=found.digest)


def _rows(found: Corpus, split: str, *, packing: bool) -> TextPart:
    pad = None if packing else found.special["pad"]
    return TextPart(found.file(split), (found.rows[split], found.length), found.dtype, pad)
