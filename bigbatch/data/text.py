"""Text as rows of tokens."""

from __future__ import annotations

from bigbatch.config.models import Text

from .base import Dataset


def load_text(config: Text, *, seed: int) -> Dataset:
    raise NotImplementedError
