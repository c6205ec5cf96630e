"""Real processes under torchrun: the same run as one process, one tracker, exact evaluation."""

import json
from pathlib import Path

import pytest

from bigbatch.cli import main
from runs.command import bigbatch, events, summary

RECIPE = """
seed: 5
duration: 2ep
batch: {global: 128, micro: 32}
optim: {name: lamb, lr: 0.02, weight_decay: 0.01}
warmup: {kind: gradual, duration: 20%, start: zero}
decay: {kind: linear}
norm: {kind: batch, span: 16}
task: {name: classification, model: bigbatch/resnet_small, options: {widths: [8, 16]}}
data: {name: digits, augment: {shift: 1}}
checkpoint: {every: 1ep}
tracking: {console: none}
precision: fp64
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.cluster
def test_two_processes_take_the_steps_of_one(recipe: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", str(recipe), f"run.dir={one}"]) == 0
    done = bigbatch(
        "train", str(recipe), f"run.dir={two}", "tracking.wandb.mode=offline", "tracking.console=lines", processes=2
    )
    assert done.returncode == 0, done.stderr

    ours, theirs = events(two, "step"), events(one, "step")
    assert len(ours) == len(theirs) == 17
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine["step"], mine["samples"], mine["lr"]) == (its["step"], its["samples"], its["lr"])
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-9)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-8)
    assert summary(two)["world_size"] == 2
    for name, value in summary(one)["metrics"].items():
        assert summary(two)["metrics"][name] == pytest.approx(value, rel=1e-8)

    # The plan and the result are printed once, by rank 0.
    assert done.stdout.count("plan for 2 processes") == 1
    assert len([line for line in done.stdout.splitlines() if line.startswith('{"run"')]) == 1

    # One Weights & Biases run, although two processes trained.
    assert len(list((two / "wandb").glob("offline-run-*"))) == 1

    # Evaluation is exact: any number of processes gives the same metrics.
    printed = bigbatch("evaluate", str(two), "--split", "test", processes=3)
    assert printed.returncode == 0, printed.stderr
    result = json.loads(next(line for line in printed.stdout.splitlines() if line.startswith("{")))
    for name in ("accuracy", "loss"):
        assert result[name] == pytest.approx(summary(two)["metrics"][name], rel=1e-12)


@pytest.mark.cluster
def test_goes_on_with_another_number_of_processes(recipe: Path, tmp_path: Path) -> None:
    one, changed = tmp_path / "one", tmp_path / "changed"
    assert main(["train", str(recipe), f"run.dir={one}"]) == 0
    assert main(["train", str(recipe), f"run.dir={changed}", "run.stop_after=7st"]) == 0
    done = bigbatch("train", str(recipe), f"run.dir={changed}", "batch.micro=64", processes=2)
    assert done.returncode == 0, done.stderr
    for name, value in summary(one)["metrics"].items():
        assert summary(changed)["metrics"][name] == pytest.approx(value, rel=1e-8)


def test_evaluate_one_checkpoint(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", str(recipe), f"run.dir={run}"]) == 0
    last = events(run, "eval")[-2]
    assert last["split"] == "validation"
    capsys.readouterr()
    assert main(["evaluate", str(run / "checkpoints" / f"{last['step']:08d}")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["accuracy"], result["split"]) == (last["accuracy"], "validation")
    assert main(["evaluate", str(tmp_path)]) == 2
