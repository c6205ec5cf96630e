"""Tar shards as WebDataset has them, read at random."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bigbatch.config.data import Source
from bigbatch.config.models import Shards

from .base import digest_of
from .cache import Cache
from .index import CUT, FAULTS, INDEX, MEMBER, Found, find, held_out, open_cache

OPEN = 64
"""Shards that a process keeps open."""


class ShardSource:
    """Images of shards in their order, by number; ``chosen``, bool (N,), of them. A known fault is a negative label."""

    def __init__(self, found: Found, *, cache: Cache, chosen: NDArray[np.bool_] | None = None) -> None:
        self.shards, self.cache = found.shards, cache
        self._starts = np.cumsum([0, *map(len, found.rows)])
        rows = np.concatenate(found.rows)
        self._at = np.arange(len(rows)) if chosen is None else np.flatnonzero(chosen)
        self._rows = rows[self._at]
        self.labels = torch.from_numpy(self._rows["label"].astype(np.int64))
        self._open: dict[int, int] = {}

    @property
    def digest(self) -> str:
        """Of lengths and labels, so that shards may lie elsewhere, or be cut otherwise."""
        return digest_of(*(self._rows[column].tobytes() for column in ("length", "label")))

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)

    def name(self, i: int) -> str:
        """Shard and key. Of a shard that is not here, or has lost the sample, the key is what `bigbatch shard` gave."""
        shard = self._shard(i)
        try:
            file = self._open.get(shard, -1) if self.shards[shard].remote else self._file(shard)
            header = os.pread(file, 100, max(0, int(self._rows["offset"][i]) - 512))
        except OSError:
            header = b""
        member = MEMBER.fullmatch(header.rstrip(b"\0").decode(errors="replace"))
        key = member[1] if member else f"{self.shards[shard].first + self._at[i] - self._starts[shard]:08d}"
        return f"{self.shards[shard].path}:{key}"

    def read(self, i: int) -> bytes:
        """The image's file; `DataError` where a URL cannot be fetched."""
        file = self._file(self._shard(i))
        offset, length, label = self._rows[i].item()
        if label < 0:
            raise ValueError(FAULTS[-1 - label])
        data = os.pread(file, length, offset)
        if len(data) < length:
            raise ValueError(FAULTS[-1 - CUT])
        return data

    def check(self) -> None:
        """Raises ValueError for a shard that has not the size in its index, and for samples with known faults."""
        for shard in self.shards:
            if not shard.remote and shard.size not in (None, found := os.path.getsize(shard.path)):
                raise ValueError(
                    f"{shard.path}: has {found} bytes, and its {INDEX} says {shard.size}; get it again, or pass over "
                    "what is gone with data.unreadable=skip"
                )
        faulty = np.flatnonzero(self._rows["label"] < 0).tolist()
        if faulty:
            self._file(self._shard(faulty[0]))
            raise ValueError(
                f"{self.name(faulty[0])}: {FAULTS[-1 - int(self.labels[faulty[0]])]} ({len(faulty)} of {len(self)} "
                "samples are faulty); mend the shard, or pass over such samples with data.unreadable=skip"
            )

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self._starts, self._at[i], side="right")) - 1

    def _file(self, shard: int) -> int:
        """A descriptor; beyond ``OPEN``, the one that was used least recently is closed."""
        file = self._open.pop(shard, None)
        if file is None:
            while len(self._open) >= OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            file = self.shards[shard].open(self.cache)
        self._open[shard] = file
        return file


def load_shards(config: Shards) -> tuple[list[ShardSource], tuple[str, ...]]:
    """Training, validation and test part, and the names of classes where an index has them.

    Raises ValueError for shards that are not there or cannot be what they should be, and unless faulty samples are to
    be skipped, for those; `DataError` for URLs that cannot be fetched.
    """
    cache = open_cache(config)
    train = find(config.train, key="data.train", cache=cache)
    if isinstance(config.validation, float):
        held = held_out(sum(map(len, train.rows)), config.validation)
        parts = [ShardSource(train, cache=cache, chosen=~held), ShardSource(train, cache=cache, chosen=held)]
    else:
        parts = [ShardSource(train, cache=cache), _other(config.validation, "data.validation", train, cache)]
    parts.append(parts[1] if config.test is None else _other(config.test, "data.test", train, cache))
    if config.unreadable == "fail":
        for part in parts:
            part.check()
    return parts, train.names


def _other(source: Source, key: str, train: Found, cache: Cache) -> ShardSource:
    found = find(source, key=key, cache=cache)
    if train.names != found.names:
        raise ValueError(
            f"{key} = {source!r}: its index has other classes than that of data.train; name those of one set"
        )
    return ShardSource(found, cache=cache)
