"""Keeps an agent and its workers going, so that none hangs and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from typing import NamedTuple

import psutil

from bigbatch.cli import FAILED, OK, USAGE
from bigbatch.config import say

ALONE = 69
"""Exit code of an agent that has not found the others, or lost them (EX_UNAVAILABLE of sysexits.h)."""
POLL, PAUSE = 0.2, 1.0


class Limits(NamedTuple):
    """Seconds: until an agent has workers, that it may be without them later, that workers may take to save and end."""

    join: float
    stall: float
    grace: float


def supervise(command: Sequence[str], environment: Mapping[str, str], *, restarts: int, limits: Limits) -> int:
    """Run an agent until its workers are done, and again after each of ``restarts`` failures; the exit code.

    The agent is the command, its workers are those of its children that lead a session of their own. An agent that is
    over a limit is killed, with its workers. One that exits with ALONE before it had any is started again for ``join``
    seconds. SIGTERM, SIGINT and SIGUSR1 reach the workers as one SIGTERM, and end all. So do exit codes 0 and 2.

    Only the main thread can call it, and the handlers stay.
    """
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: signals.append(number))
    met = time.monotonic()
    while True:
        code, worked = _attempt(command, environment, signals, limits)
        if code in (OK, USAGE) or signals:
            return code if code in (OK, USAGE) else FAILED
        if code != ALONE or worked:
            met = time.monotonic()
            if restarts <= 0:
                return FAILED
            restarts -= 1
            say(f"starting again, {restarts} restarts are left")
        elif time.monotonic() > met + limits.join:
            say(f"the others have not been met for {limits.join:g} s")
            return FAILED
        time.sleep(PAUSE)


def _attempt(
    command: Sequence[str], environment: Mapping[str, str], signals: Sequence[int], limits: Limits
) -> tuple[int, bool]:
    """One agent from start to end: its exit code, and whether it has had workers."""
    # In a session of its own, so that a terminal's Ctrl-C comes to this process alone.
    agent = subprocess.Popen(command, env=environment, start_new_session=True)
    seen: set[psutil.Process] = set()
    told, end = False, time.monotonic() + limits.join
    try:
        while agent.poll() is None:
            time.sleep(POLL)
            workers, now = _workers(agent.pid), time.monotonic()
            seen |= workers
            if signals and not told:
                told, end = True, now + limits.grace + limits.stall if workers else now
                _send(workers, signal.SIGTERM)
            elif workers and not told:
                end = now + limits.stall
            if now >= end:
                say(f"killed what is left: {'asked to stop' if signals else 'the agent hangs, without workers'}")
                return FAILED if seen else ALONE, bool(seen)
        return agent.returncode, bool(seen)
    finally:
        agent.kill()
        _send(seen, signal.SIGKILL)
        psutil.wait_procs(seen, timeout=limits.stall)
        agent.wait()


def _send(workers: Set[psutil.Process], number: signal.Signals) -> None:
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)


def _workers(agent: int) -> set[psutil.Process]:
    """The agent's workers that have not ended; it may be in no state to notice that they have."""
    alive = set()
    for child in psutil.Process(agent).children():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(child.pid) == child.pid and child.status() != psutil.STATUS_ZOMBIE:
                alive.add(child)
    return alive
