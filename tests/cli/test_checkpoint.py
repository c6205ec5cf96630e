"""``bigbatch checkpoint``: what it lists, what it calls damaged, and that an exported model is the one trained."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bigbatch.cli import main
from bigbatch.config import load_config
from bigbatch.train.checkpoint import Checkpoints
from bigbatch.train.saved import open_checkpoint

RECIPE = """
duration: 1ep
batch: {global: 96, micro: 24}
optim: {name: sgd, lr: 0.1}
task: {name: classification, model: bigbatch/resnet_small, options: {widths: [8, 16]}}
data: {name: digits}
eval: {every: 4st}
checkpoint: {every: 4st, keep: 3}
tracking: {console: none}
"""
Capture = pytest.CaptureFixture[str]


def train(run: Path, *overrides: str) -> Path:
    recipe = run.with_suffix(".yaml")
    timm = "task.model=timm/test_resnet" in overrides
    recipe.write_text(RECIPE.replace("{widths: [8, 16]}", "{drop_rate: 0.1}") if timm else RECIPE)
    assert main(["train", str(recipe), f"run.dir={run}", *overrides]) == 0
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def listed(run: Path, capsys: Capture) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["checkpoint", "ls", str(run), "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def damage(run: Path) -> None:
    path = run / "checkpoints" / "00000012" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])


def test_ls_tells_steps_samples_sizes_and_marks(run: Path, capsys: Capture) -> None:
    rows = listed(run, capsys)
    assert [(row["step"], row["samples"], row["damage"]) for row in rows] == [
        (4, 384, None), (8, 768, None), (12, 1085, None),
    ]  # fmt: skip
    assert [row["newest"] for row in rows] == [False, False, True]
    saves = {row["path"]: json.loads(Path(row["path"], "state.json").read_text()) for row in rows}
    best = max(saves.values(), key=lambda state: state["metrics"]["accuracy"])["step"]
    assert [row["step"] for row in rows if row["best"]] == [best]
    for row in rows:
        assert row["bytes"] == sum(file.stat().st_size for file in Path(row["path"]).iterdir())
    assert main(["checkpoint", "ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "whole, newest" in lines[3] and "1085" in lines[3]
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert "3 whole" in capsys.readouterr().out


def test_what_is_damaged_is_named(run: Path, capsys: Capture) -> None:
    damage(run)
    rows = listed(run, capsys)
    assert [row["newest"] for row in rows] == [False, True, False]
    assert rows[2]["samples"] is None and "optimizer.pt does not match" in rows[2]["damage"]
    assert main(["checkpoint", "ls", str(run)]) == 0
    assert "optimizer.pt does not match" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(run)]) == 1
    said = capsys.readouterr()
    assert "00000012 is damaged: optimizer.pt" in said.err and not said.out


def test_a_run_without_checkpoints(run: Path, capsys: Capture) -> None:
    shutil.rmtree(run / "checkpoints")
    assert listed(run, capsys) == []
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert "no checkpoint yet" in capsys.readouterr().err


def test_the_newest_is_the_greatest_number(run: Path, capsys: Capture) -> None:
    saves = Checkpoints(run / "checkpoints", keep=9, best="accuracy", best_is="max")
    for step in (99_999_999, 100_000_000):
        saves.save(step, model={}, optimizer={}, state={})
    assert [row["step"] for row in listed(run, capsys) if row["newest"]] == [100_000_000]


@pytest.mark.parametrize("action", [["ls"], ["verify"], ["export"]])
def test_a_path_that_is_no_run(tmp_path: Path, capsys: Capture, action: list[str]) -> None:
    dest = [str(tmp_path / "dest")] if action == ["export"] else []
    assert main(["checkpoint", *action, str(tmp_path), *dest]) == 2
    assert "neither a run directory" in capsys.readouterr().err


def code_of(card: Path) -> str:
    found = re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["norm={kind: group, groups: 4}"],
        ["task.model=timm/test_resnet", "duration=2st"],
        ["data.preprocess={rescale: symmetric, center: all, scale: feature}", "duration=2st"],
        ["data.preprocess={whiten: zca, keep: 0.9}"],
        ["data.preprocess={whiten: pca}", "task={model: bigbatch/mlp, options: {}}"],
    ],
)
def test_the_code_of_the_card_loads_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, overrides: list[str]
) -> None:
    run, dest = train(tmp_path / "run", *overrides), tmp_path / "deep" / "dest"
    capsys.readouterr()
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    assert main(["checkpoint", "export", str(run), str(dest)]) == 0
    assert sorted(path.name for path in dest.iterdir()) == [
        "README.md", "config.yaml", "model.safetensors", "preprocess.safetensors",
    ]  # fmt: skip
    assert load_config(dest / "config.yaml") == load_config(run / "config.yaml")
    card = (dest / "README.md").read_text()
    metrics = json.loads(max((run / "checkpoints").iterdir()).joinpath("state.json").read_text())["metrics"]
    assert f"| validation accuracy | {metrics['accuracy']:.4g} |" in card and "| global_batch | 96 |" in card

    monkeypatch.chdir(dest)
    names: dict[str, Any] = {}
    exec(code_of(dest / "README.md"), names)
    assert names["logits"].shape == (1, 10)
    from bigbatch.data import load_data

    test = load_data(load_config(dest / "config.yaml").data, seed=0).test
    images, labels = test.gather(torch.arange(len(test))).values()
    with torch.no_grad():
        right = names["model"](names["preprocess"](images)).argmax(1) == labels
    assert right.double().mean().item() == pytest.approx(accuracy, abs=0.01)


def test_export_of_one_checkpoint(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "00000004"
    assert main(["checkpoint", "export", str(path), str(tmp_path / "dest")]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "dest", path))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert "4 steps" in (tmp_path / "dest" / "README.md").read_text()


def test_export_overwrites_nothing_and_takes_nothing_damaged(run: Path, tmp_path: Path, capsys: Capture) -> None:
    dest = tmp_path / "dest"
    dest.mkdir()
    assert main(["checkpoint", "export", str(run), str(dest)]) == 2
    assert "is there already" in capsys.readouterr().err and list(dest.iterdir()) == []
    dest.rmdir()
    damage(run)
    assert main(["checkpoint", "export", str(run / "checkpoints" / "00000012"), str(dest)]) == 1
    assert "optimizer.pt" in capsys.readouterr().err and not dest.exists()
    assert main(["checkpoint", "export", str(run), "/proc/none"]) == 1
    assert "/proc/none" in capsys.readouterr().err


def test_an_export_that_fails_leaves_nothing(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "folder" / "dest"
    copy = shutil.copyfile

    def half(source: Path, target: Path) -> None:
        copy(source, target)
        target.write_bytes(target.read_bytes()[:-1])

    def full(source: Path, target: Path) -> None:
        half(source, target)
        raise OSError("No space left on device")

    for broken, said in ((half, "model.safetensors"), (full, "No space left")):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfile", broken)
            assert main(["checkpoint", "export", str(run), str(dest)]) == 1
        assert said in capsys.readouterr().err and list(dest.parent.iterdir()) == []
    assert main(["checkpoint", "export", str(run), str(dest)]) == 0


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_not_damaged(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pruned(path: Path) -> Any:
        if path.name == "00000004":
            shutil.rmtree(path)
        return open_checkpoint(path)

    monkeypatch.setattr("bigbatch.train.open_checkpoint", pruned)
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert "2 whole" in capsys.readouterr().out
