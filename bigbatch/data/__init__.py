"""Datasets, the order of samples, batches. Names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .augment import augment_images
    from .loader import Batch, Loader
    from .mix import mix_images, partners
    from .sampler import Stream, order, permute, shares
    from .size import size_of
    from .sources import Dataset, MemoryPart, Part, SyntheticPart, load_data

_FILES = {
    "augment": ("augment_images",),
    "loader": ("Batch", "Loader"),
    "mix": ("mix_images", "partners"),
    "sampler": ("Stream", "order", "permute", "shares"),
    "size": ("size_of",),
    "sources": ("Dataset", "MemoryPart", "Part", "SyntheticPart", "load_data"),
}
_HOME = {name: file for file, names in _FILES.items() for name in names}

__all__ = [
    "Batch", "Dataset", "Loader", "MemoryPart", "Part", "Stream", "SyntheticPart", "augment_images", "load_data",
    "mix_images", "order", "partners", "permute", "shares", "size_of",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
