"""A run that is killed in the middle of an epoch and started again ends bit for bit as one that was not."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from bigbatch.cli import main
from bigbatch.train.scale import LossScale
from runs.command import ROOT, bigbatch, command, environment, events, summary, untimed

pytestmark = pytest.mark.cluster

assemble_module = sys.modules["bigbatch.train.assemble"]

RECIPE = """
seed: 3
duration: 8ep
batch: {global: 96, micro: 24}
optim: {name: lars, lr: 1.0, weight_decay: 5.0e-4, trust_coefficient: 0.02, nesterov: true}
warmup: {kind: gradual, duration: 20%, start: zero}
decay: {kind: cosine}
clip: {kind: norm, max: 5.0}
norm: {kind: batch, span: 12}
task: {name: classification, model: bigbatch/resnet_small, options: {widths: [8, 16]}, label_smoothing: 0.1}
data: {name: digits, augment: {shift: 1, erase: 0.5}}
eval: {every: 1ep}
checkpoint: {every: 5st, keep: 3}
tracking: {console: none}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def kill_after(step: int, arguments: list[str], run: Path, *, processes: int) -> None:
    """Start the run, and kill every process of it at once when its metrics show ``step``."""
    child = subprocess.Popen(
        command(*arguments, processes=processes), cwd=ROOT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    file = run / "metrics.jsonl"
    while time.monotonic() < deadline and child.poll() is None:
        if file.exists() and file.read_text().count('"event": "step"') >= step:
            break
        time.sleep(0.002)
    assert child.poll() is None, "the run ended before it could be killed"
    # torchrun's workers have sessions of their own and would train on without it.
    workers = psutil.Process(child.pid).children(recursive=True)
    for process in [*workers, child]:
        process.kill()
    child.wait()
    psutil.wait_procs(workers)


@pytest.mark.parametrize(("processes", "strategy"), [(1, "ddp"), (2, "fsdp2")])
def test_killed_run_ends_as_the_one_that_was_not(recipe: Path, tmp_path: Path, processes: int, strategy: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start = ["train", str(recipe), f"parallel.strategy={strategy}"]
    done = bigbatch(*start, f"run.dir={whole}", processes=processes)
    assert done.returncode == 0, done.stderr

    arguments = [*start, f"run.dir={broken}"]
    kill_after(38, arguments, broken, processes=processes)
    assert not (broken / "summary.json").exists()
    done = bigbatch(*arguments, processes=processes)
    assert done.returncode == 0, done.stderr

    resumed_at = events(broken, "resume")[0]["step"]
    assert 0 < resumed_at < 91 and resumed_at % 5 == 0
    for kind in ("step", "eval"):
        assert [untimed(e) for e in events(broken, kind)] == [untimed(e) for e in events(whole, kind)]
    assert [e["step"] for e in events(broken, "step")] == list(range(1, 92))
    ours, theirs = summary(broken), summary(whole)
    assert ours["parameters_sha256"] == theirs["parameters_sha256"]
    assert ours["metrics"] == theirs["metrics"]


def train(recipe: Path, run: Path, *overrides: str) -> int:
    return main(["train", str(recipe), f"run.dir={run}", *overrides])


def steps_of(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_stop_and_go_on_is_the_same_run(recipe: Path, tmp_path: Path, precision: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    overrides = ("duration=2ep", f"precision={precision}", "batch.micro=96")
    assert train(recipe, whole, *overrides) == 0
    assert train(recipe, parts, *overrides, "run.stop_after=10st") == 0
    assert not (parts / "summary.json").exists()
    assert train(recipe, parts, *overrides) == 0
    assert summary(parts)["parameters_sha256"] == summary(whole)["parameters_sha256"]
    assert [untimed(e) for e in events(parts, "step")] == [untimed(e) for e in events(whole, "step")]


def test_compression_belongs_to_the_run_and_the_strategy_does_not(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(recipe, run, "duration=1ep", "run.stop_after=2st") == 0
    assert train(recipe, run, "duration=1ep", "parallel.compression=bf16") == 2
    assert "parallel.compression" in capsys.readouterr().err
    assert train(recipe, run, "duration=1ep", "parallel.strategy=zero1") == 0


def test_a_complete_run_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(recipe, run, "duration=1ep") == 0
    metrics = (run / "metrics.jsonl").read_bytes()
    assert train(recipe, run, "duration=1ep") == 0
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_the_summary_of_another_run_is_not_ours(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(recipe, run, "duration=1ep") == 0
    shutil.rmtree(run / "checkpoints")
    assert train(recipe, run, "duration=1ep", "seed=9", "run.stop_after=2st") == 0
    assert not (run / "summary.json").exists()


def test_warnings_and_the_test_stand_once_however_often_a_run_is_started(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(recipe, run, "duration=1ep", "run.stop_after=5st") == 0
    assert train(recipe, run, "duration=1ep") == 0
    (run / "summary.json").unlink()
    assert train(recipe, run, "duration=1ep") == 0
    assert [e["split"] for e in events(run, "eval")].count("test") == 1
    codes = [e["code"] for e in events(run, "warning")]
    assert len(codes) == len(set(codes))


def test_a_run_that_ends_without_a_loss_failed(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    overrides = ("duration=4st", "optim={name: sgd, lr: 1e30}", "warmup={kind: none}", "clip={kind: none}")
    assert train(recipe, run, *overrides) == 1
    assert "validation loss" in capsys.readouterr().err
    assert not (run / "summary.json").exists()


def test_loss_scale_goes_on_where_it_was(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble_module, "LossScale", partial(LossScale, value=2.0**20, interval=4))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    overrides = ("duration=2ep", "precision=fp16", "batch.micro=96")
    assert train(recipe, whole, *overrides) == 0
    assert train(recipe, parts, *overrides, "run.stop_after=10st") == 0
    assert train(recipe, parts, *overrides) == 0
    scales = [e["loss_scale"] for e in events(whole, "step")]
    assert len(set(scales)) > 2
    assert [e["loss_scale"] for e in events(parts, "step")] == scales
    assert summary(parts)["parameters_sha256"] == summary(whole)["parameters_sha256"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    recipe: Path, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(recipe, whole, "duration=2ep") == 0
    assert train(recipe, run, "duration=2ep", "run.stop_after=10st") == 0
    newest = run / "checkpoints" / "00000010"
    file = newest / ("manifest.json" if damage == "manifest" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage in ("truncate", "manifest"):
        content = content[: len(content) // 2]
    file.unlink() if damage == "remove" else file.write_bytes(content)
    capfd.readouterr()
    assert train(recipe, run, "duration=2ep", "tracking.console=lines") == 0
    said = capfd.readouterr()
    assert "00000010" in said.out + said.err and "damaged" in said.out + said.err
    assert events(run, "resume")[0]["step"] == 5
    assert "damaged_checkpoint" in {e["code"] for e in events(run, "warning")}
    assert summary(run)["parameters_sha256"] == summary(whole)["parameters_sha256"]


def test_no_whole_checkpoint_is_never_a_fresh_start(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(recipe, run, "run.stop_after=5st") == 0
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    before = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert train(recipe, run) == 1
    message = capsys.readouterr().err
    assert "no whole checkpoint" in message and "00000005" in message and "state.json" in message
    assert (run / "metrics.jsonl").read_bytes() == before


def test_settings_that_a_checkpoint_does_not_know_had_their_defaults(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(recipe, run, "duration=1ep", "run.stop_after=5st") == 0
    newest = run / "checkpoints" / "00000005"
    state = json.loads((newest / "state.json").read_text())
    del state["recipe"]["data"]["shuffle"], state["recipe"]["decay"]["by"], state["recipe"]["task"]["dropout"]
    (newest / "state.json").write_text(json.dumps(state))
    sums = json.loads((newest / "manifest.json").read_text())
    sums["state.json"] = hashlib.sha256((newest / "state.json").read_bytes()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(sums, indent=2))
    assert train(recipe, run, "duration=1ep", "data.shuffle=100") == 2
    assert "data.shuffle = 100: the run in" in capsys.readouterr().err
    assert train(recipe, run, "duration=1ep") == 0
    assert events(run, "resume")[0]["step"] == 5


def test_half_written_checkpoint_is_not_seen(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(recipe, run, "duration=1ep", "run.stop_after=5st") == 0
    part = run / "checkpoints" / ".00000006.part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half")
    assert train(recipe, run, "duration=1ep") == 0
    assert events(run, "resume")[0]["step"] == 5


def test_everything_loads_without_executing_code(recipe: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    run = tmp_path / "run"
    assert train(recipe, run, "duration=1ep") == 0
    newest = run / "checkpoints" / steps_of(run)[-1]
    weights = load_file(newest / "model.safetensors")
    assert weights["head.weight"].shape == (10, 16)
    state = torch.load(newest / "optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["momentum"] == 0.9
    assert set(json.loads((newest / "manifest.json").read_text())) == {
        "model.safetensors",
        "optimizer.pt",
        "preprocess.safetensors",
        "state.json",
    }
