"""Files from elsewhere, kept on this machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .base import DataError, needs

Rows = NDArray[np.void]

PAUSES = (2.0, 4.0, 8.0)
"""Seconds between attempts to fetch a file."""
SILENCE = 60.0
"""Seconds without a byte after which an attempt has failed."""

REFUSED = "the server has no such file, or refuses it"
CURL = {6: "there is no such host", 7: "nobody answers", 18: "the transfer broke off", 22: REFUSED}


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

    def open(self, url: str, *, size: int | None = None, sha256: str | None = None) -> int:
        """A descriptor of the whole file, which one process fetches while others wait. ``size``, in bytes, and
        ``sha256`` are what it must have.

        Raises `DataError` where it cannot be fetched or is another file, ValueError for a URL that is none.
        """
        path = self.folder / "fetched" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.rpartition('/')[2]}"
        with self._naming():
            while True:
                with suppress(FileNotFoundError):
                    os.utime(path, ns=(time.time_ns(),) * 2)
                    return os.open(path, os.O_RDONLY)
                with locked(path.with_name(f"{path.name}.lock")):
                    if not path.exists():
                        self._fetch(url, path, size=size, sha256=sha256)

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
            raise DataError(f"data.cache = {str(self.folder)!r}: {error}; choose a folder that has room") from None

    def _fetch(self, url: str, path: Path, *, size: int | None, sha256: str | None) -> None:
        if not self.fetch:
            raise DataError(f"{url} is not here yet")
        for pause in (*PAUSES, None):
            try:
                with whole(path) as file:
                    _transfer(url, file, size=size, sha256=sha256)
            except ConnectionError as error:
                if pause is None or str(error) == REFUSED:
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
    with needs("images", "webdataset"):
        from webdataset.gopen import gopen, gopen_schemes
    digest, stream = hashlib.sha256(), None
    try:
        with (stream := gopen(url)):
            source = getattr(stream, "stream", stream).fileno()
            ready = select.poll()
            ready.register(source)
            while chunk := os.read(source, 2**20) if ready.poll(SILENCE * 1000) else None:
                digest.update(chunk)
                file.write(chunk)
            if chunk is None:
                stream.proc.kill()
                stream.ignore_errors = True
                raise ConnectionError(f"nothing has come for {SILENCE:g} s")
    except ValueError:
        schemes = ", ".join(scheme for scheme in gopen_schemes if scheme not in ("__default__", "pipe"))
        raise ValueError(f"{url}: webdataset opens {schemes}; or fetch the file, and give its path") from None
    except OSError as error:
        raise ConnectionError(CURL.get(getattr(stream, "status", 0), str(error))) from None
    found = file.tell(), digest.hexdigest()
    if found != (size or found[0], sha256 or found[1]):
        raise ConnectionError(f"{found[0]} bytes came that are not the {size} of its index.json")
