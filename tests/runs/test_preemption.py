"""SIGTERM or SIGUSR1: all processes save the same step, say so and end; the run goes on to the undisturbed result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bigbatch.cli import main
from bigbatch.signals import StopSignal
from runs.command import ROOT, bigbatch, command, environment, events, summary, untimed

pytestmark = pytest.mark.cluster

RECIPE = """
seed: 3
duration: 6ep
batch: {global: 96, micro: 24}
optim: {name: lars, lr: 1.0, trust_coefficient: 0.02}
norm: {kind: batch, span: 12}
task: {name: classification, model: bigbatch/resnet_small, options: {widths: [8, 16]}}
data: {name: digits}
eval: {every: 1ep}
checkpoint: {every: 2ep}
tracking: {console: none}
parallel: {timeout: 60}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Path:
    run = recipe.parent / "undisturbed"
    assert bigbatch("train", str(recipe), f"run.dir={run}").returncode == 0
    return run


def start(recipe: Path, run: Path, *overrides: str, processes: int) -> subprocess.Popen[str]:
    args = command("train", str(recipe), f"run.dir={run}", *overrides, processes=processes)
    return subprocess.Popen(args, cwd=ROOT, env=environment(), stdout=-1, stderr=-1, text=True)


def reach(step: int, run: Path, child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(events(run, "step")) < step:
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_alone(number: signal.Signals, recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(recipe, run, processes=1)
    reach(10, run, child)
    child.send_signal(number)
    while child.poll() is None:  # those after the first change nothing
        time.sleep(0.05)
        child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (75, ""), err
    note = json.loads((run / "preempted.json").read_text())
    assert note["signal"] == number.name and 10 <= note["step"] < 60
    assert err == f"bigbatch: {run}: asked to stop, saved after step {note['step']}; the same command goes on\n"
    assert (run / "checkpoints" / f"{note['step']:08d}" / "model.safetensors").is_file()
    assert not (run / "summary.json").exists()

    assert bigbatch("train", str(recipe), f"run.dir={run}").returncode == 0
    assert not (run / "preempted.json").exists()
    assert summary(run)["parameters_sha256"] == summary(undisturbed)["parameters_sha256"]
    for kind in ("step", "eval"):
        ours, theirs = ([untimed(event) for event in events(path, kind)] for path in (run, undisturbed))
        assert ours == theirs


def test_one_worker_is_asked_and_all_stop(recipe: Path, tmp_path: Path) -> None:
    """Only rank 1 hears the signal; the agent sees both leave with 0, and two go on where two stopped."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    # A save merges running statistics, which rounds; so both save after each step.
    often = "checkpoint.every=1st"
    assert bigbatch("train", str(recipe), f"run.dir={whole}", often, processes=2).returncode == 0
    child = start(recipe, run, often, processes=2)
    reach(5, run, child)
    workers = psutil.Process(child.pid).children()
    (second,) = (worker for worker in workers if worker.environ().get("RANK") == "1")
    second.send_signal(signal.SIGUSR1)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    note = json.loads((run / "preempted.json").read_text())
    assert note["signal"] is None and note["step"] < 60
    assert bigbatch("train", str(recipe), f"run.dir={run}", often, processes=2).returncode == 0
    assert summary(run)["parameters_sha256"] == summary(whole)["parameters_sha256"]


def test_the_agent_is_asked(recipe: Path, tmp_path: Path) -> None:
    """torchrun hands SIGTERM on to its workers and waits for them."""
    run = tmp_path / "run"
    child = start(recipe, run, processes=2)
    reach(5, run, child)
    child.terminate()
    child.communicate(timeout=60)
    assert json.loads((run / "preempted.json").read_text())["signal"] == "SIGTERM"


def test_an_evaluation_that_is_left_out_is_made_up_for(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every single step, and so at every evaluation too; a resume does it, and keeps the best."""

    def asked(self: StopSignal) -> StopSignal:
        self.asked = "SIGTERM"
        return self

    monkeypatch.setattr(StopSignal, "__enter__", asked)
    run = tmp_path / "run"
    arguments = ["train", str(recipe), f"run.dir={run}", "duration=4st", "eval.every=2st", "checkpoint.every=4st"]
    assert [main(arguments) for _ in range(5)] == [75, 75, 75, 75, 0]
    assert [event["step"] for event in events(run, "step")] == [1, 2, 3, 4]
    assert [(event["step"], event["split"]) for event in events(run, "eval")] == [
        (2, "validation"), (4, "validation"), (4, "test"),
    ]  # fmt: skip
    state = json.loads((run / "checkpoints" / "00000004" / "state.json").read_text())
    assert state["metrics"]["accuracy"] >= 0 and not state["late"]


@pytest.mark.parametrize(("saved", "code"), [(False, 1), (True, 75)])
def test_grace_bounds_what_hangs(saved: bool, code: int) -> None:
    """Also where the main thread never comes back to the interpreter; what has been saved by then counts."""
    script = (
        "import threading, time; from bigbatch.signals import StopSignal\n"
        "with StopSignal(grace=0.5) as stop:\n"
        f"    stop.saved = {saved}; print('ready', flush=True)\n"
        "    lock = threading.Lock(); lock.acquire(); lock.acquire()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], env=environment(), stdout=-1, stderr=-1, text=True)
    assert child.stdout and child.stdout.readline() == "ready\n"
    os.kill(child.pid, signal.SIGUSR1)
    _, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert err.startswith("bigbatch: SIGUSR1 was 0.5 s ago (run.grace)")


def test_asked_while_it_starts(recipe: Path, tmp_path: Path) -> None:
    """Before torch is there: it takes one step, saves it and ends."""
    run = tmp_path / "run"
    child = start(recipe, run, processes=1)
    status = Path(f"/proc/{child.pid}/status")
    while not _catches(status):
        assert child.poll() is None
    child.send_signal(signal.SIGUSR1)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    assert json.loads((run / "preempted.json").read_text())["step"] == 1


def _catches(status: Path) -> bool:
    (caught,) = (int(line.split()[1], 16) for line in status.read_text().splitlines() if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)
