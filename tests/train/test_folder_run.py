"""A run over class folders: it goes on with the same samples, and its model knows the classes without them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from bigbatch.cli import main
from bigbatch.data.write import write_shards
from pictures import write_folder

RECIPE = {
    "duration": "2st",
    "batch": {"global": 8},
    "optim": {"name": "sgd", "lr": 0.1},
    "task": {"name": "classification", "model": "bigbatch/mlp", "options": {"widths": [4]}},
    "tracking": {"console": "none"},
}
SHAPE = {"shape": [3, 8, 8], "unreadable": "skip"}
Capture = pytest.CaptureFixture[str]


def recipe(where: Path, **data: Any) -> str:
    path = where / "recipe.yaml"
    path.write_text(json.dumps({**RECIPE, "data": {**SHAPE, **data}, "run": {"dir": str(where / "run")}}))
    return str(path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("begun")
    path = recipe(where, name="folder", path=str(write_folder(where / "images")))
    assert main(["train", path, "run.stop_after=1st"]) == 0
    return where


@pytest.fixture
def copy(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    recipe(tmp_path, name="folder", path=str(tmp_path / "images"))
    return tmp_path


def added_class(train: Path) -> None:
    shutil.copytree(train / "dog", train / "ant")


def renamed_class(train: Path) -> None:
    (train / "dog").rename(train / "fox")
    (train.parent / "val" / "dog").rename(train.parent / "val" / "fox")


def renamed_file(train: Path) -> None:
    (train / "dog" / "03.jpg").rename(train / "dog" / "99.jpg")


def moved_file(train: Path) -> None:
    (train / "dog" / "00.jpg").rename(train / "cat" / "99.jpg")


def nothing(train: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "evaluates"),
    [
        (added_class, "data: class 0 is 'ant', and was 'cat' to .*/00000001"),
        (renamed_class, "data: class 1 is 'fox', and was 'dog' to .*/00000001"),
        (renamed_file, None),
        (moved_file, None),
        (nothing, None),
    ],
)
def test_other_samples_are_another_run_and_other_classes_another_model(
    copy: Path, capsys: Capture, change: Any, evaluates: str | None
) -> None:
    change(copy / "images" / "train")
    code = main(["evaluate", str(copy / "run"), f"data.path={copy / 'images'}"])
    said = capsys.readouterr().err
    assert code == (2 if evaluates else 0) and re.search(evaluates or "", said), said
    assert main(["train", str(copy / "recipe.yaml")]) == (0 if change is nothing else 2)
    assert ("data: its content" in capsys.readouterr().err) is (change is not nothing)


def test_an_export_needs_no_images_and_names_the_classes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copy / "images")
    assert main(["checkpoint", "export", str(copy / "run"), str(copy / "model")]) == 0
    monkeypatch.chdir(copy / "model")
    assert json.loads(Path("classes.json").read_text()) == ["cat", "dog"]
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    exec(code, names := dict[str, Any]())
    assert names["logits"].shape == (1, 2) and names["names"] == ["cat", "dog"]


def test_a_run_without_a_readable_validation_image_says_so(copy: Path, capsys: Capture) -> None:
    for path in (copy / "images" / "val").glob("*/*.jpg"):
        path.write_bytes(b"")
    assert main(["train", str(copy / "recipe.yaml")]) == 1
    assert "data.validation: none of its 12 samples can be read" in capsys.readouterr().err


def test_shards_may_lie_elsewhere_but_must_be_the_same(copy: Path, capsys: Capture) -> None:
    def shards(name: str, seed: int) -> str:
        write_shards(copy / "images", copy / name, size=14_000, seed=seed, progress=lambda done, total: None)
        data = {split: f"{copy / name}/{prefix}-*.tar" for split, prefix in (("train", "train"), ("validation", "val"))}
        return recipe(copy, name="shards", cache=str(copy / "cache"), **data)

    shutil.rmtree(copy / "run")
    assert main(["train", shards("here", 3), "run.stop_after=1st"]) == 0
    assert main(["train", shards("other", 4)]) == 2
    assert "data: its content" in capsys.readouterr().err
    assert main(["train", shards("there", 3)]) == 0
