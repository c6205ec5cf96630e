"""Who holds the others up is named before the collective gives up; who has lost its launcher ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from bigbatch.config.models import Parallel
from bigbatch.dist import Runtime, repeat, run_processes
from bigbatch.dist.heartbeat import Beat, Progress, blame
from runs.command import ROOT, command, environment, events

TIMEOUT = 6.0
PARALLEL = Parallel(timeout=TIMEOUT, heartbeat=0.5)


def freeze() -> None:
    time.sleep(1.0)  # until it has said where it is
    os.kill(os.getpid(), signal.SIGSTOP)


def oversleep() -> None:
    time.sleep(TIMEOUT)


def waits_for(rank: int, folder: Path, victim: int, fault: Callable[[], None]) -> str:
    """A step in which the victim does not get through its data phase; what this rank has said when its wait is over."""
    sys.stderr = (folder / str(rank)).open("w+", buffering=1)
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    with Runtime(parallel=PARALLEL) as runtime:
        runtime.progress.step = 12
        runtime.progress.enter("data")
        if rank == victim:
            fault()
        else:
            runtime.progress.enter("exchange")
            with pytest.raises(RuntimeError):
                dist.all_reduce(torch.ones(1))
            sys.stderr.seek(0)
            said = sys.stderr.read()
            os.kill(pids[victim], signal.SIGCONT)
    return "" if rank == victim else said


def test_a_frozen_process_is_named_by_all_others_before_they_give_up(tmp_path: Path) -> None:
    first, _, last = run_processes(3, waits_for, tmp_path, 1, freeze, timeout=TIMEOUT, limit=60)
    for rank, said in ((0, first), (2, last)):
        assert f"rank {rank} (host" in said and "exchange after step 12, stands still" in said
        assert "1 of 3 processes are without a sign of life" in said
        assert "\n  rank 1 (host" in said and "data after step 12" in said
        assert said.count("\n") == 2


def test_a_process_that_does_not_come_is_named_with_its_stack(tmp_path: Path) -> None:
    first, _, last = run_processes(3, waits_for, tmp_path, 1, oversleep, timeout=TIMEOUT, limit=60)
    for said in (first, last):
        assert "1 of 3 processes are behind the others" in said
        assert "\n  rank 1 (host" in said and "data after step 12" in said
        assert "in oversleep\n    time.sleep(TIMEOUT)" in said
    itself = (tmp_path / "1").read_text()
    assert "rank 1 (host" in itself and "in oversleep" in itself


def test_the_host_of_the_store_is_named_where_it_does_not_answer(tmp_path: Path) -> None:
    _, said = run_processes(2, waits_for, tmp_path, 0, freeze, timeout=TIMEOUT, limit=60)
    assert "host 127.0.0.1 (MASTER_ADDR) does not answer" in said


BEAT = Beat(0, "n1", 7, number=5, step=3, phase="exchange", own_seconds=1.0, own_steps=3)


def moved(**fields: object) -> Beat:
    return replace(BEAT, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("others", "silent", "behind"),
    [
        ([moved(number=9), moved(number=9)], [], []),
        ([moved(number=9), moved(number=9, phase="data")], [], [2]),
        ([moved(number=9, phase="data"), moved(number=9, phase="forward")], [], [1]),
        ([moved(number=9, phase="save"), moved(number=9, phase="data")], [], [1]),
        ([moved(number=9, phase="update", step=2), moved(number=9, phase="data")], [], [1]),
        ([moved(number=5), moved(number=9)], [1], []),
        ([moved(number=5), moved(number=9, phase="data")], [1], []),
        ([moved(number=9)], [2], []),
    ],
)
def test_blame(others: list[Beat], silent: list[int], behind: list[int]) -> None:
    first = dict.fromkeys(range(3), BEAT)
    second = dict(enumerate([moved(number=9), *others]))
    assert blame(first, second, world_size=3) == (silent, behind)


def straggles(rank: int) -> list[str]:
    with Runtime(parallel=Parallel(timeout=60, heartbeat=0.05)) as runtime:
        progress, said = runtime.progress, list[str]()
        end = time.monotonic() + 60
        while not runtime.agree(bool(said) or time.monotonic() > end):
            progress.enter("data")
            time.sleep(0.04 if rank == 1 else 0.005)
            progress.enter("forward")
            progress.enter("exchange")
            dist.barrier()
            progress.enter("update")
            said += runtime.heartbeat.warnings()
        return said


def test_a_slow_process_is_named_although_its_steps_take_as_long_as_those_of_all() -> None:
    first, *others = run_processes(3, straggles, timeout=60, limit=90)
    assert len(first) == 1 and first[0].startswith("rank 1 (host") and "times the median" in first[0]
    assert others == [[], []]


def test_own_work_ends_at_the_exchange() -> None:
    progress = Progress(torch.device("cpu"))
    for phase in ("data", "forward", "data", "forward", "exchange", "update"):
        progress.enter(phase)
        time.sleep(0.2 if phase in ("exchange", "update") else 0.01)
    seconds, steps = progress.own
    assert 0.04 <= seconds < 0.2 and steps == 1


def test_a_collective_of_another_phase_is_a_wait_and_then_over() -> None:
    progress = Progress(torch.device("cpu"))
    progress.enter("eval")
    with progress.waiting():
        assert progress.phase == "exchange"
    assert (progress.phase, progress.entered) == ("eval", 3)


def test_what_is_repeated_goes_on_after_an_error_which_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def work() -> None:
        calls.append(len(calls))
        if len(calls) < 4:
            raise OSError("the disk is gone")

    end = repeat(work, seconds=0.01, name="lease")
    while len(calls) < 6:
        time.sleep(0.01)
    end()
    count = len(calls)
    time.sleep(0.05)
    assert len(calls) == count
    assert capsys.readouterr().err == "bigbatch: lease: OSError('the disk is gone')\n"


RECIPE = """
duration: 10000ep
batch: {global: 96}
optim: {name: sgd, lr: 0.01}
task: {name: classification, model: bigbatch/resnet_small, options: {widths: [8, 16]}}
data: {name: digits}
tracking: {console: none}
"""


def test_processes_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    with (tmp_path / "err").open("w") as err:
        launcher = subprocess.Popen(
            command("train", str(recipe), f"run.dir={run}", processes=2),
            cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=err,
        )  # fmt: skip
    while launcher.poll() is None and not ((run / "metrics.jsonl").exists() and events(run, "step")):
        time.sleep(0.05)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    # One sits in a collective for ever, where only a thread can end it.
    workers[1].send_signal(signal.SIGSTOP)
    launcher.kill()
    launcher.wait()
    gone, alive = psutil.wait_procs(workers[:1], timeout=30)
    for worker in (*alive, workers[1]):
        worker.kill()
    assert len(workers) == 2 and len(gone) == 1
    assert f"the launcher (pid {launcher.pid}) has died" in (tmp_path / "err").read_text()
