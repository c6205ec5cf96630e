"""``bigbatch launch`` as a user types it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigbatch.cli import launch, main
from runs.command import environment

RECIPE = """
duration: 5000st
batch: {global: 64}
optim: {name: sgd, lr: 0.05}
task: {name: classification, model: bigbatch/resnet_small, options: {widths: [4]}}
data: {name: digits}
eval: {every: 5000st}
checkpoint: {every: 5000st}
tracking: {console: none}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{RECIPE}run: {{dir: runs/mine}}\n")
    return path


def test_a_signal_saves_and_says_so(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    command = [sys.executable, "-m", "bigbatch", "launch", str(recipe), "--nproc", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment())
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    # torchrun's own agent would die of it and leave its workers behind.
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 75
    step = json.loads((run / "preempted.json").read_text())["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"{step:08}"]
    # torchrun's log directories would lie beside it.
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*/*")) == [Path("runs/mine")]


def test_a_note_is_seen_once_its_directory_is_listed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS has it, which may remember for a while that a file was not there."""

    def trained(*_: object, name: str, **__: object) -> int:
        Path(name).mkdir(parents=True)
        Path(name, "preempted.json").touch()
        monkeypatch.setattr(Path, "exists", lambda self: False)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "start", trained)
    assert main(["launch", str(recipe), "--nproc", "1"]) == 75


def test_fewer_restarts_than_none(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["launch", str(recipe), "--max-restarts", "-1"])
    assert "-1 is not a number of restarts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lr=-1"], "optim.lr = -1"),
        (["--nproc", "3"], "batch.global = 64"),
        (["--nproc", "2", "parallel.expect_world_size=4"], "parallel.expect_world_size = 4"),
        (["--nproc", "1", "--nnodes", "2"], "--head HOST:PORT"),
        (["--nproc", "1", "--nnodes", "2:1", "--head", "127.0.0.1"], "--nnodes = 2:1"),
        (["--nproc", "1", "--nnodes", "some", "--head", "127.0.0.1"], "--nnodes = some"),
        (["--nproc", "1", "--nnodes", "2:4", "--head", "127.0.0.1"], "batch.global = 64"),
        (["--nproc", "1", "--nnodes", "2", "--head", "127.0.0.1:port"], "--head = 127.0.0.1:port"),
        (["--nproc", "1", "--nnodes", "2", "--head", "no-such-host.invalid"], "--head = no-such-host.invalid"),
    ],
)
def test_a_wrong_command_starts_nothing(
    recipe: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", str(recipe), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_head_known_by_its_loopback_address_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Debian gives a machine's own name the address 127.0.1.1, where other machines do not find it."""
    import socket

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, at: connect(self, ("127.0.1.1", at[1])))
    assert main(["launch", str(recipe), "--nproc", "1", "--nnodes", "2", "--head", "myself"]) == 2
    assert "--head = myself: is 127.0.1.1 here" in capsys.readouterr().err
