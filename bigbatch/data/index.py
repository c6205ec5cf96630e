"""Which samples tar shards hold, and where: from the index that `bigbatch shard` wrote beside them, or from the headers
of their members. Without torch."""

from __future__ import annotations

import json
import math
import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from glob import glob
from io import BytesIO
from pathlib import PurePath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bigbatch.config.data import Source
from bigbatch.config.models import Shards

from .base import DataError, needs
from .cache import Absent, Cache, Rows
from .listing import EXTENSIONS

INDEX, ROWS, UNFINISHED, FORMAT = "index.json", "index.npy", "unfinished.json", "bigbatch shards 1"
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""A member's key and extension, as WebDataset parts them: at the first dot."""

URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
RANGE = re.compile(r"{(-?\d+)[.][.](-?\d+)")
MOST = 1_000_000
"""Shards that braces may stand for."""

ROW = np.dtype([("offset", "<i8"), ("length", "<i8"), ("label", "<i4")])
"""Where in its shard a sample's image begins, its bytes, and its class, or -1 - i for ``FAULTS[i]``."""
FAULTS = (
    "there is no image to its label",
    "there is no label to it, neither .cls nor label in .json",
    "its label is no class number",
    "there are several images of this name",
    "the shard is cut or damaged there",
)
NO_IMAGE, NO_LABEL, BAD_LABEL, TWICE, CUT = range(-1, -1 - len(FAULTS), -1)


@dataclass(frozen=True)
class Shard:
    """``path`` may be a URL. From an index: ``first``, the number of its first sample among all that were written with
    it, ``size`` in bytes and ``sha256``."""

    path: str
    first: int = 0
    size: int | None = None
    sha256: str | None = None

    @property
    def remote(self) -> bool:
        return URL.match(self.path) is not None

    def open(self, cache: Cache) -> int:
        """A descriptor to read from. Raises OSError, or `DataError` for a URL."""
        if self.remote:
            return cache.open(self.path, size=self.size, sha256=self.sha256)
        return os.open(self.path, os.O_RDONLY)


@dataclass(frozen=True)
class Found:
    """Shards, the samples of each, and the names of their classes where an index has them."""

    shards: tuple[Shard, ...]
    rows: tuple[Rows, ...]
    names: tuple[str, ...] = ()


def shards_size(config: Shards, *, fetch: bool) -> int:
    """Samples of all training shards; with ``fetch`` False, ValueError where a URL would have to be fetched for it."""
    return sum(map(len, find(config.train, key="data.train", cache=open_cache(config, fetch=fetch)).rows))


def held_out(size: int, share: float) -> NDArray[np.bool_]:
    """The samples, bool (size,), that validate: those whose word of a fixed stream is below ``share``, so that samples
    added at the end move none."""
    words = np.random.Philox(key=0).random_raw(size)
    return words < np.uint64(share * 2**64)


def open_cache(config: Shards, *, fetch: bool = True) -> Cache:
    return Cache(config.cache, limit=config.cache_bytes, fetch=fetch)


def find(source: Source, *, key: str, cache: Cache) -> Found:
    """The shards that a recipe's ``key`` names. Raises ValueError where there are none, where one is no tar file, and
    where an index is not of these shards."""
    try:
        patterns = [path for pattern in ((source,) if isinstance(source, str) else source) for path in _braces(pattern)]
        paths = _expand(patterns)
        listed: dict[str, tuple[Shard, Rows, tuple[str, ...]]] = {}
        for folder in dict.fromkeys(map(os.path.dirname, paths)):
            listed |= _indexed(folder, cache)
        _all_there(listed.keys() - set(paths), patterns)
        found = [listed.get(path) or (Shard(path), _scanned(Shard(path), cache), ()) for path in paths]
        shards, rows, names = zip(*found, strict=True)
        if len(set(names)) > 1:
            raise ValueError("these shards were not written together, and have different classes")
    except (OSError, ValueError) as error:
        raise ValueError(f"{key} = {source!r}: {error}") from None
    return Found(shards, rows, names[0])


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    if math.prod(abs(int(low) - int(high)) + 1 for low, high in RANGE.findall(pattern)) > MOST:
        raise ValueError(f"{pattern} stands for more than {MOST:,} shards; correct it")
    with needs("images", "braceexpand"):
        from braceexpand import braceexpand
    return list(braceexpand(pattern))


def _expand(patterns: list[str]) -> list[str]:
    found: list[str] = []
    for path in patterns:
        paths = [path] if URL.match(path) or os.path.exists(path) else sorted(glob(os.path.expanduser(path)))
        if not paths:
            raise ValueError(f"there is no file {path}; data.size=N lets a plan be made without it")
        found += paths
    path, times = Counter(found).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path} is named twice; name each shard once")
    return found


def _all_there(others: set[str], patterns: list[str]) -> None:
    """Raises ValueError for a shard that an index has and a glob would find, were it there."""
    globs = [_absolute(pattern) for pattern in patterns if re.search("[*?[]", pattern) and not URL.match(pattern)]
    lost = sorted(path for path in others if any(PurePath(_absolute(path)).match(pattern) for pattern in globs))
    if lost:
        raise ValueError(
            f"{lost[0]} is gone, and its {INDEX} has it ({len(lost)} such); get it again, or name the shards to use "
            "one by one: {000..146}"
        )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _indexed(folder: str, cache: Cache) -> dict[str, tuple[Shard, Rows, tuple[str, ...]]]:
    """By path, the shards in a folder that its index has, their samples, and the names of classes."""
    if os.path.exists(os.path.join(folder, UNFINISHED)):
        raise ValueError(f"bigbatch shard has not finished {folder}; run it again")
    try:
        data = _read(os.path.join(folder, INDEX), cache)
    except (FileNotFoundError, Absent):
        return {}
    try:
        index = json.loads(data)
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            return {}  # another tool's
        rows = np.load(BytesIO(_read(os.path.join(folder, ROWS), cache)), allow_pickle=False)
        first, found, names = 0, {}, tuple(index["classes"])
        for entry in index["shards"]:
            shard = Shard(os.path.join(folder, entry["name"]), first, entry["bytes"], entry["sha256"])
            found[shard.path] = shard, rows[first : first + entry["samples"]], names
            first += entry["samples"]
        if (len(rows), rows.dtype) != (first, ROW):
            raise ValueError(f"{ROWS} has not the {first} samples of {INDEX}")
    except DataError:
        raise
    except (EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the index in {folder} is damaged ({error}); get {INDEX} and {ROWS} again") from None
    return found


def _read(path: str, cache: Cache) -> bytes:
    """A small file, for which a server that does not answer is asked but twice."""
    with os.fdopen(cache.open(path, attempts=2) if URL.match(path) else os.open(path, os.O_RDONLY), "rb") as file:
        return file.read()


def _scanned(shard: Shard, cache: Cache) -> Rows:
    """What `scan` finds, kept for as long as the file stays as it is."""
    key = shard.path
    if not shard.remote:
        stat = os.stat(key)
        key = f"{os.path.abspath(key)} {stat.st_size} {stat.st_mtime_ns}"

    def make() -> Rows:
        try:
            with os.fdopen(shard.open(cache), "rb") as tar:
                return scan(tar, shard.path)
        except OSError as error:
            raise ValueError(f"{shard.path} cannot be read ({error.strerror})") from None

    return cache.rows(key, make)


def scan(file: BinaryIO, name: str) -> Rows:
    """The samples of a tar file, in the order of their images; only headers and labels are read.

    A faulty sample has its row too, and so has the last one of a shard that does not end as tar files do. ValueError
    for what is no tar file.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, tuple[int, int]] = {}  # where, and which
    twice: set[str] = set()
    key = ""
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    except tarfile.TarError as error:
        raise ValueError(f"{name} is no tar file ({error}); compressed ones cannot be read at random") from None
    with tar:
        try:
            for member in tar:
                match = MEMBER.fullmatch(member.name)
                if not match or not member.isreg():
                    continue
                key, kind = match[1], match[2].lower()
                if f".{kind}" in EXTENSIONS:
                    if key in images:
                        twice.add(key)
                    images[key] = member.offset_data, member.size
                elif kind == "cls":
                    labels[key] = member.offset_data, _number(_body(tar, member))
                elif kind == "json" and (label := _label(_body(tar, member))) is not None:
                    labels.setdefault(key, (member.offset_data, label))
            file.seek(tar.offset)
            whole = file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
        except tarfile.TarError:
            whole = False
    found = {key: (*place, labels.get(key, (0, NO_LABEL))[1]) for key, place in images.items()}
    found |= {key: (where, 0, NO_IMAGE) for key, (where, _) in labels.items() if key not in images}
    for faulty, fault in [*((key, TWICE) for key in twice), *([] if whole else [(key, CUT)])]:
        found[faulty] = (*found.get(faulty, (0, 0))[:2], fault)
    return np.array(list(found.values()), dtype=ROW)


def _body(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _number(text: bytes) -> int:
    return int(text) if text.strip().isdigit() and int(text) < 2**31 else BAD_LABEL


def _label(text: bytes) -> int | None:
    try:
        content: Any = json.loads(text)
    except ValueError:
        return BAD_LABEL
    if not isinstance(content, dict) or "label" not in content:
        return None
    return _number(str(content["label"]).encode())
