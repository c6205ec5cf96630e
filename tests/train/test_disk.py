"""Disks that are full or may not be written, and checkpoints that would run code: real mounts, real pickles."""

from __future__ import annotations

import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bigbatch.cli import main
from bigbatch.train import RunError, loop
from bigbatch.train.checkpoint import Checkpoints
from bigbatch.train.saved import FILES, MANIFEST, OPTIMIZER, manifest_of, open_checkpoint, sums_of
from ranks import run_ranks
from runs.command import events, summary

SIZE = 400 << 10
RECIPE = """
duration: 1ep
batch: {global: 96}
optim: {name: sgd, lr: 0.1, momentum: 0.9}
task: {name: classification, model: bigbatch/resnet_small, options: {widths: [8, 16]}}
data: {name: digits}
eval: {every: 4st}
checkpoint: {every: 4st, keep: 1}
tracking: {console: none}
"""


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a disk of its own: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path))
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def checkpoints(disk: Path) -> Checkpoints:
    return Checkpoints(disk / "checkpoints", keep=1, best="accuracy", best_is="max", write="background")


def save(saves: Checkpoints, step: int) -> BaseException | None:
    weights = torch.full((10_000,), float(step))
    saves.save(step, model={"w": weights}, optimizer={"state": {0: {"m": weights * 2}}}, state={})
    return saves.wait()


def fill(disk: Path, *, leave: int) -> Path:
    filler = disk / "filler"
    space = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - leave)))
    return filler


def test_a_full_disk_costs_the_save_and_nothing_else(disk: Path) -> None:
    saves = checkpoints(disk)
    assert save(saves, 1) is None
    failed = 0
    for leave in range(0, 120 << 10, 8 << 10):  # so that it runs full in each of the files
        filler = fill(disk, leave=leave)
        error = save(saves, 2)
        filler.unlink()
        newest, damage = checkpoints(disk).newest()
        assert newest is not None and damage == []
        if error is None:
            break
        failed += 1
        assert isinstance(error, RunError) and "No space left on device" in str(error) and "00000002" in str(error)
        assert [path.name for path in saves.root.iterdir()] == ["00000001"]
        assert newest.model()["w"][0] == 1
    assert error is None and failed > 5
    assert [path.name for path in saves.root.iterdir()] == ["00000002"]


def test_a_disk_that_became_read_only(disk: Path) -> None:
    saves = checkpoints(disk)
    assert save(saves, 1) is None
    mount("-o", "remount,ro", str(disk))
    error = save(saves, 2)
    assert isinstance(error, RunError) and "Read-only file system" in str(error)
    assert open_checkpoint(saves.root / "00000001").model()["w"][0] == 1
    mount("-o", "remount,rw", str(disk))
    assert save(saves, 3) is None
    assert [path.name for path in saves.root.iterdir()] == ["00000003"]


@pytest.mark.parametrize("write", ["background", "foreground"])
def test_a_run_goes_on_without_a_save_but_does_not_end_without_its_last(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], write: str
) -> None:
    recipe, run = tmp_path / "recipe.yaml", disk / "run"
    recipe.write_text(RECIPE)
    filler = fill(disk, leave=40 << 10)  # enough for the metrics
    command = ["train", str(recipe), f"run.dir={run}", f"checkpoint.write={write}"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "00000012 cannot be written" in said and "No space left on device" in said and "Traceback" not in said
    warnings = [event for event in events(run, "warning") if event["code"] == "checkpoint_failed"]
    assert [event["step"] for event in warnings] == [4, 8, 12]
    assert [event["step"] for event in events(run, "step")] == list(range(1, 13))
    assert list((run / "checkpoints").iterdir()) == []

    filler.unlink()
    assert main(command) == 0
    assert {event["step"] for event in events(run, "checkpoint")} == {4, 8, 12}


def trains(rank: int, recipe: str) -> str | None:
    """Why training ends on this rank, without the command line's wait for rank 0 to speak."""
    from bigbatch.cli import _assembled, make_plan
    from bigbatch.config import load_config
    from bigbatch.signals import StopSignal
    from bigbatch.train import train

    config = load_config(recipe)
    with _assembled(config, make_plan(config, world_size=2)) as parts, StopSignal(grace=config.run.grace) as stop:
        try:
            train(parts, stop)
        except RunError as error:
            return str(error)
    return None


def test_all_processes_end_where_the_last_save_fails(disk: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + f"run: {{dir: {disk / 'run'}}}\n")
    fill(disk, leave=40 << 10)
    one, two = run_ranks(2, trains, str(recipe))
    assert one == two and "00000012 cannot be written" in str(one)


def test_a_summary_is_whole_or_not_there(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = tmp_path / "recipe.yaml", disk / "run"
    recipe.write_text(RECIPE)
    checksum = loop.parameters_sha256

    def full(parts: Any) -> str:  # the last that happens before the summary is written
        fill(disk, leave=0)
        return checksum(parts)

    monkeypatch.setattr(loop, "parameters_sha256", full)
    assert main(["train", str(recipe), f"run.dir={run}"]) == 1
    said = capsys.readouterr().err
    assert "summary.json cannot be written" in said and "No space left on device" in said and "Traceback" not in said
    assert not (run / "summary.json").exists()

    monkeypatch.undo()
    (disk / "filler").unlink()
    assert main(["train", str(recipe), f"run.dir={run}"]) == 0
    assert summary(run)["steps"] == 12


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_checkpoint_that_would_run_code_runs_none(tmp_path: Path, form: str) -> None:
    saves, witness = checkpoints(tmp_path), tmp_path / "executed"
    assert save(saves, 1) is None
    path = saves.root / "00000001"
    evil = {"state": Malicious(witness), "param_groups": []}
    if form == "zip":
        torch.save(evil, path / OPTIMIZER)
    else:
        (path / OPTIMIZER).write_bytes(pickle.dumps(evil, protocol=2))
    (path / MANIFEST).write_bytes(manifest_of(sums_of(path)))
    found = open_checkpoint(path)  # all checksums are right
    with pytest.raises(RunError, match=r"00000001: optimizer\.pt .* was not loaded, since that could run code"):
        found.optimizer()
    assert not witness.exists()
    torch.load(path / OPTIMIZER, weights_only=False) if form == "zip" else pickle.loads((path / OPTIMIZER).read_bytes())
    assert witness.exists(), "the file was harmless all along"


def test_what_is_loaded_is_what_was_verified(tmp_path: Path) -> None:
    saves = checkpoints(tmp_path)
    assert save(saves, 1) is None
    found = open_checkpoint(saves.root / "00000001")
    for name in FILES:
        (found.path / name).write_bytes((found.path / name).read_bytes() + b" ")
    for load in (found.model, found.optimizer, found.preprocess):
        with pytest.raises(RunError, match="damaged"):
            load()
