"""Signs of life of every process: who holds the others up, who is slow, whose launcher has died."""

from __future__ import annotations

import json
import os
import queue
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.distributed import distributed_c10d as c10d

from bigbatch.config import say
from bigbatch.config.models import Parallel

PHASES = ("start", "log", "eval", "save", "data", "forward", "exchange", "update")
"""In the order in which a process comes to them after a number of steps. In ``exchange`` it waits for the others."""

COMPARE = 4
"""Beats between two readings of all processes; of as many beats in a row, none may be missed by one that lives."""

SLOW = 3
"""Comparisons in a row after which a slow process is named."""

SHOWN, DEEP = 8, 16
"""Processes that one message shows, and calls of a process's stack."""

T = TypeVar("T")
_HOST = socket.gethostname()


class Progress:
    """Where the training thread is: it writes, without a lock and in about a microsecond, and the heartbeat reads.

    ``step`` is the number of steps taken, ``entered`` that of phases entered, ``since`` when the last one was, in
    seconds of ``time.monotonic``. ``own`` is (seconds, steps): the part of each step up to its exchange, in which
    nobody is waited for; of the device's time where that is a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.step, self.entered, self.own = 0, 0, (0.0, 0)
        self._go_on("start")
        moment: Any = partial(torch.cuda.Event, enable_timing=True) if device.type == "cuda" else _Moment
        self._start, self._stop = moment(), moment()

    def enter(self, phase: str) -> None:
        """The thread goes on to another phase, one of `PHASES`, or to the same once more."""
        if phase == "data" and self.phase != "forward":
            self._start.record()
        elif phase == "exchange" and self.phase == "forward":
            self._stop.record()
        elif phase == "update":
            seconds, steps = self.own
            self.own = (seconds + self._start.elapsed_time(self._stop) / 1000, steps + 1)
        self._go_on(phase)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A collective in the middle of another phase."""
        phase = self.phase
        self._go_on("exchange")
        yield
        self._go_on(phase)

    def _go_on(self, phase: str) -> None:
        self.phase, self.entered, self.since = phase, self.entered + 1, time.monotonic()


class _Moment:
    """A ``torch.cuda.Event`` of the CPU's clock."""

    def record(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, later: _Moment) -> float:
        return (later._at - self._at) * 1000


@dataclass(frozen=True)
class Beat:
    """What a process says of itself: ``number`` counts its beats, and `Progress` has the rest."""

    rank: int
    host: str
    pid: int
    number: int
    step: int
    phase: str
    entered: int
    own_seconds: float
    own_steps: int

    @property
    def place(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)

    @property
    def stack(self) -> str:
        """The key of the store where its stack is, once it has stood still for long enough to leave it there."""
        return f"stack/{self.rank}/{self.entered}"

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid}), {self.phase} after step {self.step}"


class Heartbeat:
    """Tells the other processes where this one is, every ``parallel.heartbeat`` seconds, from threads of its own.

    In normal times a beat is one small write to the store of the process group, over a connection of its own. A
    process that has stood still for half of ``parallel.timeout`` reads what all have written and names on standard
    error those who hold the others up, before the collective gives up. Rank 0 also compares how long everybody works
    in a step. A process whose launcher has died ends within seconds.
    """

    def __init__(self, progress: Progress, *, rank: int, world_size: int, parallel: Parallel) -> None:
        self._warnings: deque[str] = deque()
        self._progress, self._rank, self._world_size = progress, rank, world_size
        self._timeout, self._straggler = parallel.timeout, parallel.straggler
        self._period = min(parallel.heartbeat, parallel.timeout / 20)
        self._number, self._shown, self._told = 0, -1, -1
        self._lost = False
        self._before: Mapping[int, Beat] = {}
        self._slow: Counter[int] = Counter()
        self._ends: list[Callable[[], None]] = []

    def start(self) -> None:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self._ends.append(repeat(partial(_end_without, os.getppid()), seconds=1.0, name="orphan"))
        if self._world_size > 1:
            self._store = c10d.PrefixStore("heartbeat", c10d._get_default_store().clone())
            self._beat()  # from now on all know where this process runs
            self._ends.append(repeat(self._beat, seconds=self._period, name="heartbeat"))
            self._ends.append(repeat(self._watch, seconds=self._period, name="standstill"))

    def warnings(self) -> Iterator[str]:
        """What has not yet been read of what there is to say to the user, on rank 0."""
        while self._warnings:
            yield self._warnings.popleft()

    def stop(self) -> None:
        while self._ends:
            self._ends.pop()()

    # ------------------------------------------------------------------------------------------- telling

    def _beat(self) -> None:
        if self._lost:
            return
        self._number += 1
        # A store that is gone is no news at the end of a run; in the middle of one, `_watch` finds out.
        try:
            now = self._now()
            self._store.set(str(self._rank), json.dumps(asdict(now)))
            if self._stood() > self._timeout / 4 and self._shown != now.entered:
                self._shown = now.entered
                self._store.set(now.stack, _stack())
            if self._rank == 0 and self._number % COMPARE == 0:
                self._compare(self._read())
        except RuntimeError:
            self._lost = True

    def _now(self) -> Beat:
        at = self._progress
        return Beat(self._rank, _HOST, os.getpid(), self._number, at.step, at.phase, at.entered, *at.own)

    def _stood(self) -> float:
        """Seconds since this process entered its phase."""
        return time.monotonic() - self._progress.since

    def _compare(self, beats: Mapping[int, Beat]) -> None:
        """Warn of a process whose own part of a step took ``parallel.straggler`` times the median, `SLOW` times."""
        before = self._before
        complete = len(beats) == len(before) == self._world_size
        if complete and any(beat.own_steps == before[rank].own_steps for rank, beat in beats.items()):
            return  # until all have taken a step
        self._before = beats
        if not complete:
            return
        own = {
            rank: (beat.own_seconds - before[rank].own_seconds) / (beat.own_steps - before[rank].own_steps)
            for rank, beat in beats.items()
        }
        median = statistics.median_low(own.values())  # of two processes the faster one
        for rank, seconds in own.items():
            self._slow[rank] = self._slow[rank] + 1 if seconds > self._straggler * median else 0
            if self._slow[rank] == SLOW:
                self._warnings.append(
                    f"rank {rank} (host {beats[rank].host}, pid {beats[rank].pid}) works {seconds:.3g} s in a step "
                    f"before the exchange, {seconds / median:.1f} times the median: the others wait for it"
                )

    # ------------------------------------------------------------------------------------------- asking

    def _read(self) -> dict[int, Beat]:
        """What each process last said; those that have never spoken are left out, as reading would wait for them."""
        keys = [str(rank) for rank in range(self._world_size)]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        return {int(key): Beat(**json.loads(text)) for key, text in zip(keys, self._store.multi_get(keys), strict=True)}

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The answer of the store, or None where none comes: a host that is off leaves a connection waiting."""
        answers: queue.SimpleQueue[T] = queue.SimpleQueue()

        def ask() -> None:
            with suppress(RuntimeError):
                answers.put(question())

        threading.Thread(target=ask, daemon=True).start()
        with suppress(queue.Empty):
            return answers.get(timeout=self._timeout / 10)
        return None

    def _watch(self) -> None:
        entered = self._progress.entered
        if self._told == entered or self._stood() < self._timeout / 2:
            return
        self._told = entered
        first = self._ask(self._read)
        time.sleep(COMPARE * self._period if first else 0.0)
        second = self._ask(self._read) if first else None
        text = f"host {os.environ.get('MASTER_ADDR')} (MASTER_ADDR) does not answer: it is off, or the way to it is cut"
        if first and second:
            text = self._diagnosis(first, second)
        if self._progress.entered == entered:
            say(f"{self._now()}, stands still for {self._stood():.1f} s (parallel.timeout = {self._timeout:g}): {text}")

    def _diagnosis(self, first: Mapping[int, Beat], second: Mapping[int, Beat]) -> str:
        silent, behind = blame(first, second, world_size=self._world_size)
        culprits = silent or behind
        if not culprits:
            return f"all {self._world_size} processes wait in the same place\n{_stack()}"
        hosts = ", ".join(sorted({second[rank].host for rank in culprits if rank in second})) or "unknown"
        what = "without a sign of life" if silent else "behind the others"
        lines = [f"{len(culprits)} of {self._world_size} processes are {what} (host {hosts})"]
        for rank in culprits[:SHOWN]:
            lines.append(f"  {second.get(rank, f'rank {rank}, which has never been heard of')}")
            if behind and (stack := self._ask(partial(self._stack_of, second[rank]))):
                lines.append(stack)
        return "\n".join(lines)

    def _stack_of(self, beat: Beat) -> str:
        return self._store.get(beat.stack).decode() if self._store.check([beat.stack]) else ""


def blame(first: Mapping[int, Beat], second: Mapping[int, Beat], *, world_size: int) -> tuple[list[int], list[int]]:
    """Who holds the others up, by what all said at two times `COMPARE` beats apart: the ranks that are silent, and
    where none is, those that are behind the others."""
    silent = [r for r in range(world_size) if r not in second or (r in first and first[r].number == second[r].number)]
    places = {rank: beat.place for rank, beat in second.items()}
    last = min(places.values())
    behind = [rank for rank, place in places.items() if place == last]
    return silent, [] if silent or len(behind) == world_size else behind


def repeat(work: Callable[[], object], *, seconds: float, name: str) -> Callable[[], None]:
    """Call ``work`` every so many ``seconds`` in a thread of its own, until the function that is returned is called.

    An exception is told on standard error, the same one only once, and does not end the thread.
    """
    over = threading.Event()

    def run() -> None:
        told = ""
        while not over.wait(seconds):
            try:
                work()
            except Exception as error:
                if told != (told := repr(error)):
                    say(f"{name}: {told}")

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()

    def end() -> None:
        over.set()
        thread.join(timeout=1.0)  # not for ever: it may wait for a disk or a host that is gone

    return end


def _end_without(parent: int) -> None:
    """End this process if its parent is no longer the launcher, which nobody else would do: torchrun's processes have
    sessions of their own. It may be inside a collective, where no exception and no signal handler gets through."""
    if os.getppid() != parent:
        say(f"rank {os.environ.get('RANK')}: the launcher (pid {parent}) has died, so this process ends")
        os._exit(1)


def _stack() -> str:
    """Where the main thread is, innermost call last."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame, limit=DEEP)).rstrip()
