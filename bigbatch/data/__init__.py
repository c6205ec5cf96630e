"""Datasets, the order of samples, batches. Names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .augment import augment_images
    from .base import SPLITS, Batch, DataError, Dataset, Part, Split, TensorPart
    from .loader import Loader
    from .mix import mix_images, partners
    from .pipeline import ImagePipeline, Pipeline, PlainPipeline, TextPipeline
    from .preprocess import Moments, Preprocessing, Statistics, fit_preprocess, whitening
    from .sampler import Stream, order, permute, shares
    from .size import size_of
    from .sources import MemoryPart, SyntheticPart, load_data

_FILES = {
    "augment": ("augment_images",),
    "base": ("SPLITS", "Batch", "DataError", "Dataset", "Part", "Split", "TensorPart"),
    "loader": ("Loader",),
    "mix": ("mix_images", "partners"),
    "pipeline": ("ImagePipeline", "Pipeline", "PlainPipeline", "TextPipeline"),
    "preprocess": ("Moments", "Preprocessing", "Statistics", "fit_preprocess", "whitening"),
    "sampler": ("Stream", "order", "permute", "shares"),
    "size": ("size_of",),
    "sources": ("MemoryPart", "SyntheticPart", "load_data"),
}
_HOME = {name: file for file, names in _FILES.items() for name in names}

__all__ = [
    "SPLITS", "Batch", "DataError", "Dataset", "ImagePipeline", "Loader", "MemoryPart", "Moments", "Part", "Pipeline",
    "PlainPipeline", "Preprocessing", "Split", "Statistics", "Stream", "SyntheticPart", "TensorPart", "TextPipeline",
    "augment_images", "fit_preprocess", "load_data", "mix_images", "order", "partners", "permute", "shares", "size_of",
    "whitening",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
