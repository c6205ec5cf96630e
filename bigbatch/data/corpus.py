"""Text files, tokenised and kept, without torch."""

from __future__ import annotations

from bigbatch.config.models import Text


def text_size(config: Text) -> int:
    raise NotImplementedError
