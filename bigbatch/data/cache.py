"""Files from elsewhere, kept on this machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .base import DataError

Rows = NDArray[np.void]

PAUSES = (2.0, 4.0, 8.0)
"""Seconds between attempts to fetch a file."""
CONNECT, SILENCE = 10, 60
"""Seconds without an answer, and without a byte of it, after which an attempt has failed."""


class Absent(DataError):
    """The server has no such file, which object stores may put as 403; or it is not here, and not to be fetched."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time is in the block, the others wait; one that dies is out of it. ``path`` is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is at ``path`` once all of it is."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Cache:
    """A folder of what was fetched, of which the least recently opened is dropped beyond ``limit`` bytes."""

    def __init__(self, folder: str, *, limit: int | None = None, fetch: bool = True) -> None:
        self.folder, self.limit, self.fetch = Path(folder).expanduser(), limit, fetch

    def open(self, url: str, *, size: int | None = None, sha256: str | None = None, attempts: int = 4) -> int:
        """A descriptor of the whole file, which one process fetches while others wait. ``size``, in bytes, and
        ``sha256`` are what it must have.

        Raises `Absent` where there is none, `DataError` where it cannot be fetched or is another file, ValueError for
        other URLs than https and http.
        """
        if not re.match("https?://", url, re.IGNORECASE):  # URLs come from strangers, and curl can do a lot
            raise ValueError(f"{url}: only https and http are fetched; fetch the file, and give its path")
        name = url.partition("?")[0].rpartition("/")[2]
        path = self.folder / "fetched" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
        with self._naming():
            while True:
                with suppress(FileNotFoundError):
                    os.utime(path, ns=(time.time_ns(),) * 2)
                    return os.open(path, os.O_RDONLY)
                with locked(path.with_name(f"{path.name}.lock")):
                    if not path.exists():
                        self._fetch(url, path, size=size, sha256=sha256, attempts=attempts)

    def rows(self, key: str, make: Callable[[], Rows]) -> Rows:
        """What ``make`` gives, made once for each ``key``."""
        path = self.folder / "scanned" / f"{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()}.npy"
        with self._naming():
            if not path.exists():
                with locked(path.with_name("lock")):
                    if not path.exists():
                        with whole(path) as file:
                            np.save(file, make(), allow_pickle=False)
            found: Rows = np.load(path, allow_pickle=False)
            return found

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"data.cache = {str(self.folder)!r}"
            raise DataError(f"{where}: {error}; choose a folder with room, to write to and to lock files in") from None

    def _fetch(self, url: str, path: Path, *, size: int | None, sha256: str | None, attempts: int) -> None:
        if not self.fetch:
            raise Absent(f"{url} is not here yet")
        for pause in (*PAUSES[: attempts - 1], None):
            try:
                with whole(path) as file:
                    _transfer(url, file, size=size, sha256=sha256)
            except ConnectionError as error:
                if pause is None:
                    raise DataError(f"{url} cannot be fetched: {error}") from None
                time.sleep(pause)
            else:
                break
        self._drop(path)

    def _drop(self, newest: Path) -> None:
        """Make room for what comes next. Files that a process has open stay readable to it."""
        if self.limit is None:
            return
        found = {}
        for path in newest.parent.iterdir():
            with suppress(FileNotFoundError):  # another process drops too
                if path.suffix not in (".part", ".lock") and path != newest:
                    found[path] = path.stat()
        room = self.limit - newest.stat().st_size
        for path in sorted(found, key=lambda path: found[path].st_mtime_ns, reverse=True):
            room -= found[path].st_size
            if room < 0:
                path.unlink(missing_ok=True)


def _transfer(url: str, file: BinaryIO, *, size: int | None, sha256: str | None) -> None:
    """Fetch ``url`` into ``file``; ConnectionError where it does not come, or is not what it should be."""
    command = ["curl", "--silent", "--show-error", "--fail", "--location", "--globoff", "--proto", "=https,http"]
    command += ["--connect-timeout", f"{CONNECT}", "--speed-limit", "1", "--speed-time", f"{SILENCE}", url]
    digest = hashlib.sha256()
    try:
        curl = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        raise DataError(f"{url} cannot be fetched: curl does not start ({error}); install it, or fetch it") from None
    with curl:
        assert curl.stdout and curl.stderr
        while chunk := curl.stdout.read(2**20):
            digest.update(chunk)
            file.write(chunk)
        problem = curl.stderr.read().decode(errors="replace").strip()
    if re.search(r"error: (403|404|410)\b", problem):
        raise Absent(f"{url} cannot be fetched: {problem}")
    if curl.returncode:
        raise ConnectionError(problem)
    found = file.tell(), digest.hexdigest()
    if found != (size or found[0], sha256 or found[1]):
        raise ConnectionError(f"{found[0]} bytes came that are not the {size} of its index.json")
