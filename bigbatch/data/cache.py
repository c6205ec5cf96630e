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
                        save_rows(path, make())
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
        part = path.with_name(f"{path.name}.part")
        for pause in (*PAUSES, None):
            reason = _transfer(url, part, size=size, sha256=sha256)
            if not reason:
                part.replace(path)
                self._drop(path)
                return
            if reason == REFUSED or pause is None:
                break
            time.sleep(pause)
        part.unlink(missing_ok=True)
        raise DataError(f"{url} cannot be fetched: {reason}")

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


def save_rows(path: Path, rows: Rows) -> None:
    """Write an array so that it is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _transfer(url: str, part: Path, *, size: int | None, sha256: str | None) -> str:
    """Fetch ``url`` into ``part``, and tell what is wrong with it, if anything."""
    with needs("images", "webdataset"):
        from webdataset.gopen import gopen, gopen_schemes
    digest = hashlib.sha256()
    stream = None
    try:
        with part.open("wb") as file, (stream := gopen(url)):
            source = getattr(stream, "stream", stream).fileno()
            ready = select.poll()
            ready.register(source)
            while ready.poll(SILENCE * 1000):
                if not (chunk := os.read(source, 2**20)):
                    break
                digest.update(chunk)
                file.write(chunk)
            else:
                stream.proc.kill()
                stream.ignore_errors = True
                return f"nothing has come for {SILENCE:g} s"
            file.flush()
            os.fsync(file.fileno())
        found = part.stat().st_size
    except ValueError:
        schemes = ", ".join(scheme for scheme in gopen_schemes if scheme not in ("__default__", "pipe"))
        raise ValueError(f"{url}: webdataset opens {schemes}; or fetch the file, and give its path") from None
    except OSError as error:
        return CURL.get(getattr(stream, "status", 0), str(error))
    if (size or found, sha256 or digest.hexdigest()) != (found, digest.hexdigest()):
        return f"{found} bytes came that are not the {size} of its index.json"
    return ""
