"""Keeps an agent and its workers going, so that none hangs and none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import psutil

from bigbatch.cli import FAILED, OK, USAGE

ALONE = 69
"""Exit code of an agent that has not found the others (EX_UNAVAILABLE of sysexits.h)."""
POLL = 0.2


def supervise(
    command: Sequence[str], *, environment: Mapping[str, str], restarts: int, join: float, stall: float, grace: float
) -> int:
    """Run an agent until its workers are done, and again after each of ``restarts`` failures; the exit code.

    The agent is the command, its workers are those of its children that lead a session of their own. It is killed, with them, after ``join`` seconds
    without any, and after ``stall`` seconds without any more; an agent that exits with ALONE has ``join`` seconds too
    and does not count. SIGTERM, SIGINT and SIGUSR1 reach the workers as SIGTERM, once: they have ``grace`` seconds to
    save and to end. An exit code of 0 or 2 is final.

    Only the main thread can call it, and the handlers stay.
    """
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: signals.append(number))
    met = time.monotonic()
    while True:
        code, worked = _attempt(command, environment, signals, join=join, stall=stall, grace=grace)
        if code in (OK, USAGE) or signals:
            return code
        if worked:
            met = time.monotonic()
        if worked or code != ALONE:
            if not restarts:
                return FAILED
            restarts -= 1
            say(f"starting again; {restarts} more restarts after this one")
        elif time.monotonic() > met + join:
            say(f"no other machine has been met for {join:g} s")
            return FAILED
        time.sleep(1)


def say(message: str) -> None:
    print(f"bigbatch launch: {message}", file=sys.stderr, flush=True)


def _attempt(
    command: Sequence[str],
    environment: Mapping[str, str],
    signals: Sequence[int],
    *,
    join: float,
    stall: float,
    grace: float,
) -> tuple[int, bool]:
    """One agent from start to end: its exit code, and whether it has had workers."""
    # In a session of its own, so that a terminal's Ctrl-C comes to this process alone.
    agent = subprocess.Popen(command, env=environment, start_new_session=True)
    seen: set[psutil.Process] = set()
    told = False
    limit = time.monotonic() + join
    try:
        while agent.poll() is None:
            time.sleep(POLL)
            workers = _workers(agent.pid)
            seen |= workers
            now = time.monotonic()
            if signals and not told:
                told, limit = True, now + grace + stall if workers else now
                for worker in workers:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.send_signal(signal.SIGTERM)
            elif workers and not told:
                limit = now + stall
            if now >= limit:
                say(f"the agent has no workers, and hangs: killed (process {agent.pid})")
                return FAILED if seen else ALONE, bool(seen)
        return agent.returncode, bool(seen)
    finally:
        agent.kill()
        for worker in seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        agent.wait()


def _workers(agent: int) -> set[psutil.Process]:
    """The agent's workers that have not ended; it may be in no state to notice that they have."""
    alive = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(agent).children():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(child.pid) == child.pid and child.status() != psutil.STATUS_ZOMBIE:
                    alive.add(child)
    return alive
