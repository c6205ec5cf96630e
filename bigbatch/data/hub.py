"""Datasets of the Hugging Face library: from its hub, saved by it, or in Parquet and Arrow files."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.config.models import Hub

from .base import Split, digest_of, needs
from .index import held_out

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class HubSource:
    """Images of a split, ``table``, by number; ``rows``, int64 (N,), of it; labels int64 (N,)."""

    where: str
    table: Any
    rows: NDArray[np.int64]
    labels: Tensor

    @property
    def digest(self) -> str:
        """Of lengths and labels; the library's own fingerprint changes with where its files lie, and when they came."""
        import pyarrow.compute

        (images,) = self.table.data.columns
        lengths = pyarrow.compute.binary_length(pyarrow.compute.struct_field(images, "bytes")).cast("int64")
        return digest_of(*(a.tobytes() for a in (self.rows, self.labels.numpy(), lengths.fill_null(-1).to_numpy())))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return f"{self.where}[{self.rows[i]}]"

    def read(self, i: int) -> bytes:
        (image,) = self.table[int(self.rows[i])].values()
        data, path = (image["bytes"], image["path"]) if image else (None, None)
        if data is not None:
            return bytes(data)
        if path is None:
            raise ValueError("there is no image in it")
        with open(path, "rb") as file:
            return file.read()

    def take(self, chosen: NDArray[np.bool_]) -> HubSource:
        import torch

        return replace(self, rows=self.rows[chosen], labels=self.labels[torch.from_numpy(chosen)])


def hub_size(config: Hub, *, fetch: bool) -> int:
    """Samples of all the training split; without ``fetch``, ValueError where it is not on this machine."""
    return len(_table(config, "train", fetch=fetch))


def load_hub(config: Hub) -> tuple[list[HubSource], tuple[str, ...]]:
    """Training, validation and test part, and the names of classes where the dataset has them.

    Raises ValueError for what the library does not find or cannot read, and for columns that are no images or no
    class numbers.
    """
    train, names = _split(config, "train")
    if isinstance(config.validation, float):
        held = held_out(len(train), config.validation)
        parts = [train.take(~held), train.take(held)]
    else:
        parts = [train, _alike(config, "validation", names)]
    return [*parts, parts[1] if config.test is None else _alike(config, "test", names)], names


def _alike(config: Hub, key: Split, names: tuple[str, ...]) -> HubSource:
    source, other = _split(config, key)
    if other != names:
        raise ValueError(f"data.{key} = {getattr(config, key)!r}: has other classes than the training split")
    return source


def _split(config: Hub, key: Split) -> tuple[HubSource, tuple[str, ...]]:
    """All of a split, and the names of its classes."""
    import torch

    table = _table(config, key)
    where = f"{config.path}:{getattr(config, key)}"
    for column in ("image", "label"):
        if getattr(config, column) not in table.column_names:
            there = ", ".join(table.column_names)
            raise ValueError(f"data.{column} = {getattr(config, column)!r}: {where} has no such column; it has {there}")
    from datasets import Image

    try:
        images = table.select_columns([config.image]).cast_column(config.image, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"data.image = {config.image!r}: that column of {where} has no images ({error})") from None
    labels = table.with_format("numpy").select_columns([config.label])[:][config.label]
    kind = table.features[config.label]
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or (labels < 0).any():
        raise ValueError(
            f"data.label = {config.label!r}: that column of {where} is {kind}, and not a class number from 0 on in "
            "every row; the library's class_encode_column makes numbers of names"
        )
    rows = np.arange(len(table))
    source = HubSource(where, images, rows, torch.from_numpy(labels.astype(np.int64)))
    return source, tuple(getattr(kind, "names", ()))


def _table(config: Hub, key: Split, *, fetch: bool = True) -> Any:
    split = getattr(config, key)
    what = f"data.{key} = {split!r} of data.path = {config.path!r}"
    options: dict[str, Any] = {"name": config.config, "revision": config.revision, "data_files": _files(config)}
    with needs("images", "datasets"):
        return open_split(config.path, split, what=what, fetch=fetch, **options)


def open_split(path: str, split: str, *, what: str, fetch: bool = True, **options: Any) -> Any:
    """A split as the library has it; ``options`` are its load_dataset's. Raises ValueError, which says ``what`` cannot
    be had, and ImportError without the library."""
    import datasets

    datasets.disable_progress_bars()
    path, download = os.path.expanduser(path), datasets.DownloadConfig(local_files_only=not fetch)
    try:
        if any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(path)
            return saved[split] if isinstance(saved, dict) else datasets.DatasetDict(train=saved)[split]
        return datasets.load_dataset(path, split=split, download_config=download, **options)
    except Exception as error:  # of many kinds, by version and by what the dataset is made of
        raise ValueError(f"{what} cannot be had ({error})") from None


def _files(config: Hub) -> dict[str, list[str]] | None:
    if config.files is None:
        return None
    named = {part: (files,) if isinstance(files, str) else files for part, files in config.files.items()}
    return {part: [os.path.expanduser(file) for file in files] for part, files in named.items()}
