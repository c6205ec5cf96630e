"""``bigbatch data``: what it counts, and that it finds what is twice there or cannot be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bigbatch.cli import main
from bigbatch.config.models import Digits
from bigbatch.custom import ALLOW
from bigbatch.data import Dataset, TensorPart, load_data
from bigbatch.spec import Spec

RECIPE = """
duration: 1ep
batch: {global: 8}
optim: {name: sgd, lr: 0.1}
task: {name: classification, model: bigbatch/resnet_small}
data: {name: digits, augment: {shift: 1, mixup: 0.2}}
"""
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return str(tmp_path / "recipe.yaml")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigbatch.analysis.survey._SECONDS", 0.0)


def surveyed(capsys: Capture, *args: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["data", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_of_digits(recipe: str, tmp_path: Path, capsys: Capture) -> None:
    found, known = surveyed(capsys, recipe, "--out", str(tmp_path / "out")), load_data(Digits(name="digits"), seed=0)
    assert found["samples"] == found["read"] == {"train": 1085, "validation": 357, "test": 355}
    assert found["classes"]["train"] == {str(k): int((known.train.labels == k).sum()) for k in range(10)}
    assert found["columns"] == {"image": "uint8 (1, 8, 8)", "label": "int64"}
    assert [*found["statistics"]["subtracted"], *found["statistics"]["divided by"]] == pytest.approx(
        [255 * float(known.mean), 255 * float(known.std)]
    )
    assert found["unreadable"] == found["duplicates"] == {}
    assert found["samples_per_second"] > 0 and found["inputs"]["image"]["min"] < 0
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        assert sheet.width > 500 and len(set(sheet.convert("L").tobytes())) > 20


def test_a_sample_is_enough_unless_asked(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert surveyed(capsys, recipe, "--out", str(tmp_path), "--samples", "99")["read"]["train"] == 99
    assert surveyed(capsys, recipe, "--out", str(tmp_path), "--samples", "9", "--scan")["read"]["train"] == 1085


def test_a_table_without_matplotlib(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["data", recipe, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "pip install 'bigbatch[plot]'" in said.err and "contact_sheet" not in said.out
    assert "1,085" in said.out and "nothing of what was read is there twice" in said.out


def twice(*, seed: int) -> Dataset:
    """Sample 3 of the training part is its sample 1 and the validation part's sample 2."""
    train, other = torch.rand(20, 4), torch.rand(20, 4)
    train[3] = other[2] = train[1]
    parts = [TensorPart({"x": x, "y": x[:, 0]}) for x in (train, other, torch.rand(20, 4))]
    return Dataset(*parts, Spec((4,)), kind="plain")


def test_what_is_there_twice(recipe: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW, "1")
    custom = ["data.name=custom", "data.target=cli.test_data:twice", "task.name=custom", "task.target=a:b"]
    found = surveyed(capsys, recipe, *custom)
    assert found["duplicates"] == {"train": [[1, 3]], "train and validation": [[1, 2]]}
    assert found["columns"] == {"x": "float32 (4,)", "y": "float32"} and found["contact_sheet"] is None


def test_what_cannot_be_read(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for file in range(6):
                image = Image.effect_noise((9, 8), 20 * file + number + len(split))
                image.convert("RGB").save(folder / f"{file}.png")
    (tmp_path / "images/train/dog/5.png").write_bytes(b"no image")
    folder = ["data.name=folder", f"data.path={tmp_path}/images", "data.shape=[3,8,8]", "data.workers=0"]
    found = surveyed(capsys, recipe, *folder, "--out", str(tmp_path))
    assert [Path(name).name for name in found["unreadable"]] == ["5.png"]
    assert found["samples"]["train"] == 12 and found["classes"]["train"] == {"cat": 6, "dog": 5}
    # without a test part of its own, the validation part is the test part too
    assert set(found["duplicates"]) == {"validation and test"}
    # where statistics are taken, before there is a model
    for verb, override in (("train", "data.unreadable=fail"), ("data", "data.eval_transforms=[]")):
        assert main([verb, recipe, *folder, override, f"run.dir={tmp_path}/run"]) == 1
    assert not (tmp_path / "run").exists()


def test_rows_of_text(recipe: str, tmp_path: Path, capsys: Capture) -> None:
    words = ["in", "the", "beginning", "god", "made", "heaven", "and", "earth", "out", "of", "nothing", "at", "all"]
    lines = (" ".join(words[(i * k) % 13] for k in range(1, 12)) for i in range(1, 200))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    text = ["data.name=text", f"data.train={tmp_path}/text.txt", f"data.cache={tmp_path}", "data.length=16"]
    task = ["task.name=masked_lm", "task.model=transformers/bert", "data.tokenizer.vocabulary=60"]
    found = surveyed(capsys, recipe, *text, *task)
    assert found["columns"] == {"input_ids": "int64 (16,)"} and found["contact_sheet"] is None
    for original, masked in found["rows"]:
        assert "[MASK]" not in original and len(original) > 20 and original != masked
    assert any("[MASK]" in masked for _, masked in found["rows"])
