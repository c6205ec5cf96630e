"""``metrics.jsonl``: one JSON object a line, each step exactly once however often the run was stopped."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from .base import Event, Status

MOST_UNWRITTEN = 16 * 2**20
"""Bytes that are kept for a disk that takes no more; later events are left out until it does."""


class Jsonl:
    """Writes every event as one line, in the order of its keys, at once.

    Every line is JSON that any reader takes: a float that is not finite is written as ``null``. A start from the
    beginning (``resume_step`` None) empties the file; a resume first rewrites it, atomically, without what the run is
    about to live through again (see `read_events`). What a full disk does not take, be it the rewrite, is tried again
    with the next event, and raises OSError until it succeeds.
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        self._path = path
        self._resume_step = resume_step
        self._file: FileIO | None = None
        self._unwritten = bytearray()

    def start(self, config: dict[str, Any], plan: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._write()

    def log(self, event: Event) -> None:
        if len(self._unwritten) < MOST_UNWRITTEN:
            self._unwritten += _line(event)
        self._write()

    def sync(self) -> None:
        self._write()
        if self._file:
            os.fsync(self._file.fileno())

    def finish(self, status: Status) -> None:
        try:
            self._write()
        finally:
            if self._file:
                self._file.close()

    def _write(self) -> None:
        if self._file is None:
            self._file = self._rewritten()
        # A file without a buffer: a write takes what there is room for, and says how much.
        while self._unwritten:
            del self._unwritten[: self._file.write(self._unwritten)]

    def _rewritten(self) -> FileIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f".{self._path.name}.part")
        kept = [] if self._resume_step is None else read_events(self._path, until=self._resume_step)
        with part.open("wb") as file:
            file.writelines(map(_line, kept))
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)
        return FileIO(self._path, "a")


def _line(event: Event) -> bytes:
    try:
        line = json.dumps(event, allow_nan=False)
    except ValueError:
        line = json.dumps(_finite(event), allow_nan=False)
    return f"{line}\n".encode()


def read_events(path: Path, *, until: int | None = None) -> Iterator[Event]:
    """The events of a ``metrics.jsonl``; none where there is no such file.

    ``until`` leaves out what a run that goes on from that step will do again: all later steps, and the test at the end.
    Resumes are kept, as they are not repeated. A line that is not a
    whole JSON object, such as the last one of a killed process, is left out.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if not isinstance(event, dict):
                continue
            kept = until is None or event.get("event") == "resume"
            if kept or (event.get("step", 0) <= until and event.get("split") != "test"):
                yield event


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
