from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def compare(*runs: Path) -> tuple[int, str, str]:
    command = [sys.executable, "launch/compare.py", *map(str, runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def finished(path: Path, *, name: str, batch: int, accuracy: float) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump({"optim": {"name": name, "lr": 0.1}}))
    (path / "plan.json").write_text(json.dumps({"global_batch": batch, "epochs": 30.0}))
    summary = {"steps": 1234, "samples": 9, "seconds": 12.34, "world_size": 2, "metrics": {"accuracy": accuracy}}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_runs_side_by_side(tmp_path: Path) -> None:
    small = finished(tmp_path / "small", name="sgd", batch=32, accuracy=0.9751)
    large = finished(tmp_path / "large", name="lars", batch=4096, accuracy=0.97)
    code, out, err = compare(small, large)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if "2" in line]
    assert rows == [
        ["small", "32", "sgd", "2", "1,234", "30", "12.3", "97.51%"],
        ["large", "4,096", "lars", "2", "1,234", "30", "12.3", "97.00%"],
    ]


@pytest.mark.parametrize("missing", ["small", "small/summary.json"])
def test_a_run_that_is_not_there(missing: str, tmp_path: Path) -> None:
    small = finished(tmp_path / "small", name="sgd", batch=32, accuracy=0.9)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    code, out, err = compare(small)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert str(tmp_path / missing) in err and "run.dir" in err


def test_no_run_at_all() -> None:
    assert compare() == (2, "", "usage: compare.py RUN_DIR ...\n")


@pytest.mark.parametrize("script", ["launch/torchrun.sh", "launch/torchrun_multinode.sh", "slurm/train.sbatch"])
def test_a_script_without_a_recipe_tells_its_usage(script: str) -> None:
    done = subprocess.run(["bash", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{script} CONFIG [key.path=value ...]" in done.stderr


def test_several_machines_need_a_head() -> None:
    env = {name: value for name, value in os.environ.items() if name != "HEAD"} | {"NNODES": "2"}
    script = "launch/torchrun_multinode.sh"
    done = subprocess.run(["bash", script, "recipe.yaml"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "HEAD=HOST[:PORT] NNODES=N" in done.stderr
