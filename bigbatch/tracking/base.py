"""One small protocol for all that listens to a run, and the fan-out that keeps a listener's failure from it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

Event = dict[str, Any]
"""``event`` names the kind, ``step`` the optimiser steps taken so far (the first step's event says 1)."""

Status = Literal["done", "failed", "preempted"]


class Tracker(Protocol):
    """Listens to a run. Methods may raise: `Trackers` then goes on without the tracker."""

    def start(self, config: dict[str, Any], plan: dict[str, Any]) -> None: ...

    def log(self, event: Event) -> None: ...

    def finish(self, status: Status) -> None: ...


class Trackers:
    """Hands every call to each tracker in turn.

    A tracker that raises is named once on stderr and dropped; training never stops for it. ``warnings`` are logged as
    soon as the trackers have started.
    """

    def __init__(self, trackers: Sequence[Tracker], *, warnings: Sequence[Event] = ()) -> None:
        self._trackers = list(trackers)
        self._warnings = warnings

    def start(self, config: dict[str, Any], plan: dict[str, Any]) -> None:
        self._each(lambda tracker: tracker.start(config, plan))
        for warning in self._warnings:
            self.log(warning)

    def log(self, event: Event) -> None:
        self._each(lambda tracker: tracker.log(event))

    def finish(self, status: Status) -> None:
        self._each(lambda tracker: tracker.finish(status))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                _report(type(tracker).__name__.lower(), error)


def _report(name: str, error: Exception) -> None:
    what = " ".join(str(error).split()) or type(error).__name__
    with contextlib.suppress(OSError, ValueError):  # stderr itself may be gone
        print(f"tracking: {name} failed: {what}; training goes on without it", file=sys.stderr, flush=True)
