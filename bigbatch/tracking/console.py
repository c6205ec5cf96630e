"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import rich.console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from .base import Event, Status

Mode = Literal["auto", "bar", "lines", "none"]

LINES = 20
"""Lines that a whole run prints for its steps, where there is no bar."""

REDRAW = 0.1
"""Seconds between two drawings of the bar."""


class Console:
    """Shows epoch, loss, learning rate, samples per second and the time left.

    ``auto`` is ``bar`` on a terminal and ``lines`` elsewhere: one line per 1/20 of the run. Both print a line per
    evaluation, resume and warning. ``none`` prints nothing. ``clock`` gives seconds.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        total_samples: int,
        total_steps: int,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = console or rich.console.Console(force_terminal=True if mode == "bar" else None)
        self._mode = mode if mode != "auto" else "bar" if self._out.is_interactive else "lines"
        self._samples, self._steps = total_samples, total_steps
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._line = -1
        self._drawn = 0.0
        # No thread of its own: the bar is drawn when a step is logged, so that it never competes with training.
        self._bar = Progress(
            TaskProgressColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}", markup=False),
            console=self._out,
            auto_refresh=False,
            expand=True,
        )

    def start(self, config: dict[str, Any], plan: dict[str, Any]) -> None:
        if self._mode == "bar":
            self._bar.add_task("", total=self._samples)
            self._bar.start()

    def log(self, event: Event) -> None:
        if self._mode == "none":
            return
        match event["event"]:
            case "step":
                self._step(event)
            case "eval":
                self._print(f"{event['split']}  {_pairs(event, without=('event', 'split'))}")
            case "resume":
                self._print(f"resume  {_pairs(event, without=('event',))}")
            case "warning":
                self._print(f"warning: {event['message']}")

    def sync(self) -> None:
        """Nothing here outlives more than it does already."""

    def finish(self, status: Status) -> None:
        if self._mode == "bar":
            self._bar.refresh()
            self._bar.stop()

    def _step(self, event: Event) -> None:
        now, samples = self._clock(), event["samples"]
        text = _pairs({name: event[name] for name in ("epoch", "loss", "lr")})
        text += f"  {event['samples_per_second']:,.0f}/s"
        left = self._left(samples, now)
        if left is not None:
            text += f"  {timedelta(seconds=round(left))} left"
        if self._mode == "bar":
            due = now - self._drawn >= REDRAW
            self._bar.update(self._bar.task_ids[0], completed=samples, description=text, refresh=due)
            self._drawn = now if due else self._drawn
        elif samples * LINES // self._samples > self._line:
            self._line = samples * LINES // self._samples
            self._print(f"{samples / self._samples:4.0%}  step {event['step']}/{self._steps}  {text}")

    def _left(self, samples: int, now: float) -> float | None:
        """Seconds to the end at the mean pace of this start, evaluations included; unknown at the first step."""
        if self._first is None:
            self._first = samples, now
        done, seconds = samples - self._first[0], now - self._first[1]
        return (self._samples - samples) * seconds / done if done else None

    def _print(self, text: str) -> None:
        self._out.out(text, highlight=False)


def _pairs(event: Event, *, without: tuple[str, ...] = ()) -> str:
    values = {name: value for name, value in event.items() if name not in without}
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
