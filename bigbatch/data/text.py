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
    with, ``attention_mask`` too, int64 (B, L), 0 behind the row's end, which has the id ``end``."""

    def __init__(
        self, path: Path, shape: tuple[int, int], dtype: str, pad: int | None = None, end: int | None = None
    ) -> None:
        self._made = (path, shape, dtype, pad, end)
        self._rows, self._pad, self._end = np.memmap(path, dtype, "r", shape=shape), pad, end

    def __reduce__(self) -> tuple[Any, ...]:
        return TextPart, self._made  # without the rows, which another process maps for itself

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, index: Tensor, epoch: Tensor | None = None) -> Batch:
        tokens = torch.from_numpy(self._rows[index.numpy()].astype(np.int64))
        if self._pad is None:
            return {"input_ids": tokens}
        place = torch.arange(1, tokens.shape[1] + 1)
        length = ((tokens != self._pad) * place).amax(1, keepdim=True)
        if self._end == self._pad:  # as GPT-2 has it: the first one behind the text ends it
            length = (length + 1).clamp(min=2)
        return {"input_ids": tokens, "attention_mask": (place <= length).long()}


def load_text(config: Text) -> Dataset:
    """The text that ``config`` names, tokenised if it was not yet. Raises ValueError as `corpus.corpus` does."""
    found = corpus(config)
    spec = Spec((config.length,), found.vocabulary, special=found.special)
    train, validation, test = (_rows(found, split, packing=config.packing) for split in ("train", "validation", "test"))
    return Dataset(train, validation, test, spec, kind="text", tokenizer=found.tokenizer, digest=found.digest)


def _rows(found: Corpus, split: str, *, packing: bool) -> TextPart:
    ids = () if packing else (found.special["pad"], found.special["sep"])
    return TextPart(found.file(split), (found.rows[split], found.length), found.dtype, *ids)
