"""Who holds the others up is named before the collective gives up; who has lost its launcher ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
            os.kill(pids[victim], signal.SIGCONT)
        sys.stderr.seek(0)
        return sys.stderr.read()


SCENES: dict[str, tuple[int, int, Callable[[], None]]] = {
    "frozen": (3, 1, freeze),
    "asleep": (3, 1, oversleep),
    "no store": (2, 0, freeze),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each rank has said in each scene. They spend their time waiting, so they do it all at once."""

    def play(scene: str) -> list[str]:
        world, victim, fault = SCENES[scene]
        folder = tmp_path_factory.mktemp("scene")
        return run_processes(world, waits_for, folder, victim, fault, timeout=TIMEOUT, limit=60)

    with ThreadPoolExecutor() as pool:
        return dict(zip(SCENES, pool.map(play, SCENES), strict=True))


def test_a_frozen_process_is_named_by_all_others_before_they_give_up(said: dict[str, list[str]]) -> None:
    for rank in (0, 2):
        text = said["frozen"][rank]
        assert f"rank {rank} (host" in text and "exchange after step 12, stands still" in text
        assert "1 of 3 processes are without a sign of life" in text
        assert "\n  rank 1 (host" in text and "data after step 12" in text
        assert text.count("\n") == 2


def test_a_process_that_does_not_come_is_named_with_its_stack(said: dict[str, list[str]]) -> None:
    first, itself, last = said["asleep"]
    for text in (first, last):
        assert "1 of 3 processes are behind the others" in text
        assert "\n  rank 1 (host" in text and "data after step 12" in text
        assert "in oversleep\n    time.sleep(TIMEOUT)" in text
    assert itself.startswith("bigbatch: rank 1 (host") and "in oversleep" in itself


def test_the_host_of_the_store_is_named_where_it_does_not_answer(said: dict[str, list[str]]) -> None:
    assert "host 127.0.0.1 (MASTER_ADDR) does not answer" in said["no store"][1]


BEAT = Beat(0, "n1", 7, number=5, step=3, phase="exchange", entered=9, own_seconds=1.0, own_steps=3)


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


def test_own_work_ends_at_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    fake = SimpleNamespace(monotonic=lambda: clock, perf_counter=lambda: clock)
    monkeypatch.setattr(sys.modules["bigbatch.dist.heartbeat"], "time", fake)
    progress = Progress(torch.device("cpu"))
    for phase in ("data", "forward", "data", "forward", "exchange", "update", "log") * 2:
        progress.enter(phase)
        clock += 100.0 if phase in ("exchange", "update", "log") else 1.0
    assert progress.own == (8.0, 2)


def test_a_collective_of_another_phase_is_a_wait_and_then_over() -> None:
    progress = Progress(torch.device("cpu"))
    progress.enter("eval")
    with progress.waiting():
        assert progress.phase == "exchange"
    assert (progress.phase, progress.entered) == ("eval", 4)


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
