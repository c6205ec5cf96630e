"""One small protocol for all that listens to a run, and the fan-out that keeps a listener's failure from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from bigbatch.config import say

Event = dict[str, Any]
"""``event`` names the kind, ``step`` the optimiser steps taken so far (the first step's event says 1)."""

Status = Literal["done", "failed", "preempted"]


class Tracker(Protocol):
    """Listens to a run. Methods may raise; see `Trackers`."""

    def start(self, config: dict[str, Any], plan: dict[str, Any]) -> None: ...

    def log(self, event: Event) -> None: ...

    def sync(self) -> None: ...

    def finish(self, status: Status) -> None: ...


class Trackers:
    """Hands every call to each tracker in turn.

    A tracker that raises is named once on stderr, and training never stops for it. It is dropped, unless it is an
    event that the system would not take (OSError: a full disk, a lost connection): that may pass, so the next event is
    handed to it all the same. ``warnings`` are logged as soon as the trackers have started.
    """

    def __init__(self, trackers: Sequence[Tracker], *, warnings: Sequence[Event] = ()) -> None:
        self._trackers = list(trackers)
        self._warnings = warnings
        self._named: set[Tracker] = set()

    def start(self, config: dict[str, Any], plan: dict[str, Any]) -> None:
        self._each(lambda tracker: tracker.start(config, plan))
        for warning in self._warnings:
            self.log(warning)

    def log(self, event: Event) -> None:
        self._each(lambda tracker: tracker.log(event), may_pass=OSError)

    def sync(self) -> None:
        """What has been logged outlives a power cut, where that is up to this machine."""
        self._each(lambda tracker: tracker.sync(), may_pass=OSError)

    def finish(self, status: Status) -> None:
        self._each(lambda tracker: tracker.finish(status))

    def _each(self, call: Callable[[Tracker], None], *, may_pass: type[Exception] | tuple[()] = ()) -> None:
        for tracker in tuple(self._trackers):
            try:
                call(tracker)
            except (Exception, SystemExit) as error:  # rich leaves when the console's reader does
                dropped = not isinstance(error, may_pass)
                if dropped:
                    self._trackers.remove(tracker)
                if dropped or tracker not in self._named:
                    self._named.add(tracker)
                    then = "training goes on without it" if dropped else "it is tried again with the next event"
                    say(f"{type(tracker).__name__.lower()} failed: {one_line(error)}; {then}", who="tracking")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
