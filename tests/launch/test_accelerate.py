"""What `accelerate launch` is asked to start, starts, and trains the run that torchrun's processes train."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from bigbatch.cli import main
from runs.command import ROOT, environment, summary

pytestmark = pytest.mark.cluster

CONFIGS = ROOT / "launch" / "accelerate"
RECIPE = str(ROOT / "configs/digits/lars_512.yaml")
OVERRIDES = ("duration=2st", "tracking.console=none")


def launch(config: Path, run: Path, *overrides: str, options: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *options]
    command += ["-m", "bigbatch", "train", RECIPE, *OVERRIDES, f"run.dir={run}", *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=environment())


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of two processes' parameters."""
    run = tmp_path_factory.mktemp("torchrun") / "run"
    script = ["bash", "launch/torchrun.sh", RECIPE, *OVERRIDES, f"run.dir={run}"]
    path = f"{Path(sys.executable).parent}:{environment()['PATH']}"
    done = subprocess.run(script, cwd=ROOT, env=environment() | {"NPROC": "2", "PATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr
    return str(summary(run)["parameters_sha256"])


def test_two_processes_on_the_cpu(torchrun: str, tmp_path: Path) -> None:
    process = launch(CONFIGS / "cpu_two.yaml", tmp_path)
    assert process.wait(timeout=300) == 0
    assert (summary(tmp_path)["world_size"], summary(tmp_path)["parameters_sha256"]) == (2, torchrun)


def test_two_nodes(torchrun: str, tmp_path: Path) -> None:
    nodes = []
    for rank in "01":
        options = ("--num_processes", "2", "--machine_rank", rank)
        nodes.append(launch(CONFIGS / "several_nodes.yaml", tmp_path, options=options))
    assert [process.wait(timeout=300) for process in nodes] == [0, 0]
    assert (summary(tmp_path)["world_size"], summary(tmp_path)["parameters_sha256"]) == (2, torchrun)


def test_deepspeed(tmp_path: Path) -> None:
    strategy = ("parallel.strategy=deepspeed", "parallel.zero_stage=1")
    process = launch(CONFIGS / "deepspeed.yaml", tmp_path, *strategy, options=("--num_processes", "2"))
    assert process.wait(timeout=300) == 0
    assert summary(tmp_path)["world_size"] == 2


def test_one_process(tmp_path: Path) -> None:
    assert launch(CONFIGS / "single_gpu.yaml", tmp_path).wait(timeout=300) == 0
    assert summary(tmp_path)["world_size"] == 1


def test_one_box_is_the_two_on_the_cpu_with_more_processes() -> None:
    box, two = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("one_box.yaml", "cpu_two.yaml"))
    assert box | {"num_processes": 2} == two


def test_one_where_several_were_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    asked = yaml.safe_load((CONFIGS / "cpu_two.yaml").read_text()) | {"distributed_type": "MULTI_CPU", "use_cpu": True}
    config.write_text(yaml.safe_dump(asked))
    assert launch(config, tmp_path / "run").wait(timeout=300) != 0
    assert "has started one" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_strangers_are_refused(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "2")
    assert main(["train", RECIPE, *OVERRIDES, f"run.dir={tmp_path}"]) == 2
    assert f"{variable} = 2" in capsys.readouterr().err
