"""The watchdog over agents made of bash: none hangs, none leaves a worker behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import psutil
import pytest

from bigbatch.cli import watchdog
from bigbatch.cli.watchdog import ALONE, Limits, supervise

LIMITS = Limits(join=20.0, stall=0.5, grace=20.0)
FOREVER = 'setsid sleep 1000 & echo $! >> "$PIDS"'


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No long pauses, and afterwards the signal handlers of before."""
    monkeypatch.setattr(watchdog, "POLL", 0.05)
    monkeypatch.setattr(watchdog, "PAUSE", 0.05)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def run(script: str, *, pids: Path, restarts: int = 0, limits: Limits = LIMITS) -> int:
    """The exit code; what wrote its process id to ``$PIDS`` must have ended."""
    code = supervise(["bash", "-c", script], os.environ | {"PIDS": str(pids)}, restarts=restarts, limits=limits)
    for pid in started(pids):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return code


def started(pids: Path) -> list[int]:
    return list(map(int, pids.read_text().split())) if pids.exists() else []


@pytest.mark.parametrize(("end", "code"), [("exit 0", 0), ("exit 1", 1), ("exit 2", 2), ("kill -9 $$", 1)])
def test_the_end_of_an_agent(end: str, code: int, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    assert run(f"{FOREVER}; sleep 0.3; {end}", pids=pids, restarts=1) == code
    # Orphaned workers would train on. What is done is done, and a bad recipe is as bad the next time.
    assert len(started(pids)) == (2 if code == 1 else 1)


def test_an_agent_that_hangs_without_workers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # The worker ends and its agent, which is stuck, does not fetch its exit code.
    agent = 'echo $$ >> "$PIDS"; setsid sleep 0.3 & exec sleep 1000'
    assert run(agent, pids=tmp_path / "pids", restarts=1) == 1
    assert len(started(tmp_path / "pids")) == 2
    assert capfd.readouterr().err.count("hangs") == 2


def test_an_agent_that_never_has_workers(tmp_path: Path) -> None:
    # What is no worker, such as a compiler that an import asks something, does not count.
    agent = 'echo $$ >> "$PIDS"; sleep 0.5 & exec sleep 1000'
    assert run(agent, pids=tmp_path / "pids", restarts=9, limits=LIMITS._replace(join=1.0)) == 1
    assert len(started(tmp_path / "pids")) == 1


def test_others_that_are_late_cost_no_restart(tmp_path: Path) -> None:
    agent = f'echo $$ >> "$PIDS"; [ $(wc -l < "$PIDS") -eq 2 ] || exit {ALONE}; setsid sleep 0.3 & wait'
    assert run(agent, pids=tmp_path / "pids") == 0
    assert len(started(tmp_path / "pids")) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_workers_once(number: signal.Signals, tmp_path: Path) -> None:
    worker = tmp_path / "worker"
    worker.write_text(f"trap 'echo saved >> {tmp_path}/saved; sleep 0.4; exit 0' TERM; while :; do sleep 0.1; done")
    timers = [Timer(delay, os.kill, (os.getpid(), number)) for delay in (0.8, 1.0)]
    for timer in timers:
        timer.start()
    assert run(f"setsid bash {worker} & wait $!", pids=tmp_path / "pids", restarts=3) == 0
    assert (tmp_path / "saved").read_text() == "saved\n"


def test_workers_that_do_not_heed_a_signal(tmp_path: Path) -> None:
    Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    agent = """setsid bash -c 'trap "" TERM; echo $$ >> "$PIDS"; while :; do sleep 0.1; done' & wait"""
    assert run(agent, pids=tmp_path / "pids", restarts=3, limits=LIMITS._replace(grace=0.5)) == 1
    assert len(started(tmp_path / "pids")) == 1


def test_a_signal_before_there_are_workers(tmp_path: Path) -> None:
    Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert run('echo $$ >> "$PIDS"; exec sleep 1000', pids=tmp_path / "pids", restarts=3) == 1
    assert len(started(tmp_path / "pids")) == 1
