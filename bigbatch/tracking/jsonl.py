"""``metrics.jsonl``: one JSON object a line, each step exactly once however often the run was stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from .base import Event, Status


class Jsonl:
    """Writes every event as one line, in the order of its keys, and flushes it.

    Every line is JSON that any reader takes: a float that is not finite is written as ``null``. A start from the
    beginning (``resume_step`` None) empties the file; a resume first rewrites it, atomically, without what the run is
    about to live through again (see `read_events`).
    """

    _file: TextIO

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        self._path = path
        self._resume_step = resume_step

    def start(self, config: dict[str, Any], plan: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f".{self._path.name}.part")
        self._file = part.open("w", encoding="utf-8")
        if self._resume_step is not None:
            for event in read_events(self._path, until=self._resume_step):
                self._write(event)
        self._file.flush()
        os.fsync(self._file.fileno())
        part.replace(self._path)  # the open file follows its name

    def log(self, event: Event) -> None:
        self._write(event)
        self._file.flush()

    def finish(self, status: Status) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        try:
            line = json.dumps(event, allow_nan=False)
        except ValueError:
            line = json.dumps(_finite(event), allow_nan=False)
        self._file.write(line + "\n")


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
