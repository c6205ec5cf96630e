"""Images in files: class folders, tar shards, datasets of the Hugging Face library."""

from __future__ import annotations

from bigbatch.config.models import Folder, Hub, Shards

from .base import Dataset


def load_files(config: Folder | Shards | Hub, *, seed: int) -> Dataset:
    raise NotImplementedError
