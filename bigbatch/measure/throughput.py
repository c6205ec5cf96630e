"""Samples per second of training alone."""

from __future__ import annotations

import time


class Throughput:
    """Counts samples over the time since the last reading; evaluations and saves are left out by `pause`."""

    def __init__(self, *, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._since_reading = 0.0
        self._samples = 0
        self._started: float | None = None

    def resume(self) -> None:
        self._started = time.perf_counter()

    def pause(self) -> None:
        if self._started is not None:
            passed = time.perf_counter() - self._started
            self.seconds += passed
            self._since_reading += passed
            self._started = None

    def add(self, samples: int) -> None:
        self._samples += samples

    def read(self) -> float:
        """Samples per second since the last reading."""
        self.pause()
        rate = self._samples / self._since_reading if self._since_reading else 0.0
        self._samples, self._since_reading = 0, 0.0
        self.resume()
        return rate
