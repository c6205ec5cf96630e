"""One writer: whoever starts, stops, dies or comes back, a run directory has one owner."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.cli import main
from bigbatch.train import RunError
from bigbatch.train.lease import Lease
from ranks import run_ranks
from runs.command import ROOT, command, environment, events, summary
from train.assembled import BASE

LONG = 1e6
"""Seconds of a lease that does not end while a test runs."""


def acquired(run: Path, *, seconds: float = LONG, patience: float = 0.0) -> Lease:
    lease = Lease(run, seconds=seconds)
    assert lease.acquire(patience=patience, limit=LONG)
    return lease


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "owner").iterdir())


def rewrite(run: Path, **fields: object) -> None:
    """The owner's file as a process of another machine, or of another time, would have written it."""
    (path,) = (run / "owner").iterdir()
    path.write_text(json.dumps(json.loads(path.read_text().splitlines()[0]) | fields) + "\n")


# ----------------------------------------------------------------------------------------- one at a time


def race(rank: int, folder: Path, rounds: int) -> list[int]:
    """The owner number of each round, 0 where another one was the winner."""
    numbers = []
    for number in range(rounds):
        lease = Lease(folder / str(number % 10), seconds=LONG)
        dist.barrier()
        lease.acquire(patience=0.0, limit=LONG)
        numbers.append(lease.owner)
        dist.barrier()
        lease.release()
    return numbers


def test_of_two_that_start_at_once_one_wins(tmp_path: Path) -> None:
    """Ten new directories, then each of them again and again as its last owner left it."""
    results = run_ranks(3, race, tmp_path, 60)
    assert [sorted(numbers) for numbers in zip(*results, strict=True)] == [[0, 0, 1 + n // 10] for n in range(60)]
    assert sum(numbers.count(0) < 60 for numbers in results) > 1, "one process was always first, so nobody raced"
    assert files(tmp_path / "0") == ["6.json"]


def test_what_is_released_is_free_and_what_is_not_is_not(tmp_path: Path) -> None:
    first, second = acquired(tmp_path), Lease(tmp_path, seconds=LONG)
    assert not second.acquire(patience=0.0, limit=LONG)
    with pytest.raises(RunError, match=rf"run\.dir.*process {os.getpid()} on host .* has not ended in 0 s"):
        second.acquire(patience=0.0, limit=0.0)
    first.release()
    assert second.acquire(patience=0.0, limit=LONG)
    assert (first.owner, second.owner) == (1, 2)
    second.check()
    with pytest.raises(RunError, match="taken over"):
        first.check()
    second.release()


def test_an_owner_of_this_machine_that_is_dead_is_followed_at_once(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from bigbatch.train.lease import Lease; "
    code += "Lease(Path(sys.argv[1]), seconds=1e6).acquire(patience=0, limit=0); os._exit(1)"
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment())
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT) is None:
        continue
    # Even one that its parent has not collected yet.
    lease = acquired(tmp_path)
    assert lease.owner == 2
    lease.release()
    child.wait()


@pytest.mark.parametrize("fields", [{"started": "1"}, {"pid": 2**22 + 1}])
def test_a_process_number_that_another_process_has_now_is_a_dead_owner(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    acquired(tmp_path)._stop()
    rewrite(tmp_path, **fields)
    acquired(tmp_path).release()


@pytest.mark.parametrize("fields", [{"place": "another machine", "pid": 2**22 + 1}, {"place": "", "pid": 2**22 + 1}])
def test_an_owner_elsewhere_must_have_been_silent_for_the_lease(
    tmp_path: Path, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    acquired(tmp_path)._stop()
    rewrite(tmp_path, **fields)
    clock = 0.0

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds
        if clock < 25:
            os.utime(tmp_path / "owner" / "1.json")

    monkeypatch.setattr(
        sys.modules["bigbatch.train.lease"], "time", SimpleNamespace(monotonic=lambda: clock, sleep=sleep)
    )
    lease = Lease(tmp_path, seconds=10.0)
    assert not lease.acquire(patience=20.0, limit=LONG)
    assert not lease.acquire(patience=10.0, limit=LONG)
    assert lease.acquire(patience=10.0, limit=LONG) and 34 < clock < 36 and lease.owner == 2
    lease.release()


def test_a_half_written_file_is_an_owner_that_nobody_knows(tmp_path: Path) -> None:
    acquired(tmp_path)._stop()
    (tmp_path / "owner" / "1.json").write_text('{"owner": 1, "pl')
    assert not Lease(tmp_path, seconds=LONG).acquire(patience=0.0, limit=LONG)
    acquired(tmp_path, seconds=0.2, patience=10).release()


def frozen_and_back(rank: int, run: Path) -> str:
    """Rank 0 owns the directory and is stopped; rank 1 takes over and lets it go on."""
    pids: list[int] = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    lease = Lease(run, seconds=1.0)
    if rank == 0:
        lease.acquire(patience=0.0, limit=LONG)
        lease.begin(0)
        dist.barrier()
        os.kill(os.getpid(), signal.SIGSTOP)
        with pytest.raises(RunError) as error:
            lease.check()
        lease.release()
        return str(error.value)
    dist.barrier()
    while not lease.acquire(patience=1.0, limit=LONG):
        continue
    lease.begin(7)
    os.kill(pids[0], signal.SIGCONT)
    assert lease.valid(7, 1) and not lease.valid(8, 1) and lease.valid(8, 2)
    return f"process {os.getpid()}"


def test_a_stopped_owner_is_taken_over_and_writes_no_more(tmp_path: Path) -> None:
    message, owner = run_ranks(2, frozen_and_back, tmp_path)
    assert f"taken over by {owner}" in message
    assert files(tmp_path) == ["2.json"]


def test_an_owner_whose_file_is_removed_has_lost_it(tmp_path: Path) -> None:
    lease = acquired(tmp_path, seconds=0.1)
    (tmp_path / "owner" / "1.json").unlink()
    while not lease.lost:
        time.sleep(0.01)
    with pytest.raises(RunError, match="taken over by an unknown process"):
        lease.check()
    lease.release()
    assert files(tmp_path) == []


# ----------------------------------------------------------------------------- whose checkpoints are the run's


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=6))
def test_valid_is_what_no_later_owner_has_gone_back_before(
    tmp_path_factory: pytest.TempPathFactory, owners: list[tuple[int, int]]
) -> None:
    """``owners``: (how many steps it goes back, how many it then takes)."""
    run = tmp_path_factory.mktemp("run")
    line: list[int] = []
    saved = []
    for back, steps in owners:
        lease = acquired(run)
        line = line[: max(0, len(line) - back)]
        lease.begin(len(line))
        line += [lease.owner] * steps
        saved += [(step, lease.owner) for step in range(len(line) - steps + 1, len(line) + 1)]
        lease.release()
    last = acquired(run)
    for step, owner in saved:
        assert last.valid(step, owner) == (step <= len(line) and line[step - 1] == owner)
    assert last.valid(0, 0)
    last.release()


# -------------------------------------------------------------------------------------------- a whole run

RECIPE = """
duration: 60st
batch: {global: 96}
optim: {name: sgd, lr: 0.01}
task: {name: classification, model: bigbatch/resnet_small, options: {widths: [8, 16]}}
data: {name: digits}
checkpoint: {every: 5st}
run: {lease: 1}
tracking: {console: none}
"""


def test_a_run_that_is_frozen_and_comes_back_does_not_touch_the_one_that_took_over(tmp_path: Path) -> None:
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)

    def start() -> subprocess.Popen[str]:
        line = command("train", str(recipe), f"run.dir={run}")
        return subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)

    first = start()
    while first.poll() is None and not ((run / "metrics.jsonl").exists() and len(events(run, "step")) >= 12):
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = start()
    _, said = second.communicate(timeout=60)
    assert second.returncode == 0 and f"owned by process {first.pid}" in said
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 1 and f"taken over by process {second.pid}" in said and "Traceback" not in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert summary(run)["steps"] == 60 and [e["step"] for e in events(run, "step")] == list(range(1, 61))
    assert json.loads((run / "checkpoints/00000060/state.json").read_text())["owner"] == 2


def test_a_disk_that_fails_at_the_start_is_not_the_user_s_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 would tell a scheduler never to try again."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(BASE | {"run": {"dir": str(tmp_path / "run")}, "tracking": {"console": "none"}}))
    for number, code in ((errno.ESTALE, 1), (errno.ENOSPC, 1), (errno.EROFS, 2)):

        def fails(self: Lease, step: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Lease, "begin", fails)
        assert main(["train", str(recipe)]) == code
        said = capsys.readouterr().err
        assert "run.dir = " in said and os.strerror(number) in said and "Traceback" not in said
