"""`bigbatch slurm`, and what a task of a plain srun learns about itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.cli import main
from bigbatch.cli.slurm import first_host, join_step

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs/digits/lars_512.yaml")
TASK = {
    "SLURM_JOB_ID": "645",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu-[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def told(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> list[str | None]:
    monkeypatch.setattr(os, "environ", dict(variables))
    join_step()
    return [os.environ.get(name) for name in TOLD]


def test_a_task_learns_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, TASK) == ["3", "1", "4", "gpu-07", "29997"]
    assert told(monkeypatch, TASK | {"SLURM_RESTART_COUNT": "1"})[4] == "10004"  # round the corner


def test_ports_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [{"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(n)} for job in range(7, 600) for n in range(4)]
    ports = [told(monkeypatch, TASK | case)[4] for case in cases]
    assert len(set(ports)) == len(ports)
    assert all(10000 <= int(port or 0) < 30000 for port in ports)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        {name: value for name, value in TASK.items() if name != "SLURM_STEP_NUM_TASKS"},  # a batch script's shell
    ],
)
def test_who_is_alone_stays_so(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, variables) == [None] * 5


def test_a_launcher_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"RANK": "5", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "here", "MASTER_PORT": "5"}
    assert told(monkeypatch, TASK | theirs) == list(theirs.values())
    addressed = TASK | {"MASTER_ADDR": "here", "MASTER_PORT": "5"}
    assert told(monkeypatch, addressed) == ["3", "1", "4", "here", "5"]


NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,5}", fullmatch=True)
NUMBERS = st.lists(st.from_regex(r"0{0,2}[0-9]{1,3}(-[0-9]{3})?", fullmatch=True), min_size=1, max_size=3)
REST = st.lists(NAMES | st.just("m[1-2,5]"), max_size=2)


@given(prefix=NAMES, numbers=NUMBERS, suffix=st.just("") | NAMES, rest=REST)
def test_the_first_host_of_a_list(prefix: str, numbers: list[str], suffix: str, rest: list[str]) -> None:
    assert first_host(",".join([prefix, *rest])) == prefix
    listed = f"{prefix}[{','.join(numbers)}]{suffix}"
    assert first_host(",".join([listed, *rest])) == prefix + numbers[0].partition("-")[0] + suffix


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stub that keeps what it is given; it takes jobs of two nodes and refuses others."""
    stub = tmp_path / "sbatch"
    stub.write_text(f"#!/bin/sh\ncat >{tmp_path}/submitted\ngrep -q '^#SBATCH --nodes=2' {tmp_path}/submitted\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "submitted"


def test_the_script_is_that_of_the_repository(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = ["seed=3", "warmup={kind: gradual, duration: 5%}"]
    options = ["--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00", "--sbatch", "signal=B:USR1@300"]
    assert main(["slurm", RECIPE, *options, "--sbatch", "comment=a b", *ours]) == 0
    assert not sbatch.exists()
    head, body = capsys.readouterr().out.split("set -euo pipefail\n")
    old_head, old_body = (ROOT / "slurm/train.sbatch").read_text().split("set -euo pipefail\n")
    assert body == old_body
    *new, arguments = [line for line in head.splitlines() if line not in old_head]
    assert new == [
        "#SBATCH --job-name=lars_512",
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=1:00:00",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --comment='a b'",
    ]
    assert [line for line in old_head.splitlines() if line not in head] == [
        "#SBATCH --job-name=bigbatch",
        "#SBATCH --nodes=1",
        "#SBATCH --signal=B:USR1@120",
    ]
    told = ["bash", "-c", f"{arguments}; printf '%s\\n' \"$@\"", "script", "late=1"]
    assert subprocess.check_output(told, text=True).splitlines() == [RECIPE, *ours, "late=1"]


def test_submitting(sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["slurm", RECIPE, "--job-name", "mine", "--partition", "gpu", "--submit"]
    assert main([*command, "--nodes", "2", "-o", str(tmp_path / "job.sbatch")]) == 0
    assert sbatch.read_text() == (tmp_path / "job.sbatch").read_text()
    assert "#SBATCH --job-name=mine\n" in sbatch.read_text() and "#SBATCH --partition=gpu\n" in sbatch.read_text()
    assert main([*command, "--nodes", "1"]) == 1
    capsys.readouterr()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--nodes", "3"], ["batch.global", "512", "3"]),
        (["--nodes", "2", "--gpus-per-node", "3"], ["batch.global", "512", "6"]),
        (["--sbatch", "exclusive"], ["--sbatch", "exclusive", "OPTION=VALUE"]),
        (["--sbatch", "nodes=4"], ["--sbatch nodes=4", "--nodes 4"]),
        (["--sbatch=--gpus-per-node=4"], ["gpus-per-node=4", "write --gpus-per-node 4"]),
        (["-o", "/nowhere/job.sbatch"], ["--output", "/nowhere/job.sbatch"]),
        (["optim.name=lion"], ["optim.name", "lion"]),
    ],
)
def test_refused(args: list[str], words: list[str], sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", RECIPE, "--submit", *args]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words), message
    assert not sbatch.exists()


def test_no_sbatch_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert main(["slurm", RECIPE, "--submit"]) == 2
    assert "no sbatch" in capsys.readouterr().err
