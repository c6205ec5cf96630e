"""Datasets and tasks of the user's own: only where allowed, and told by name where they are not what they should be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

from bigbatch.cli import main
from bigbatch.config.models import CustomData
from bigbatch.custom import ALLOW
from bigbatch.data import DataError, Dataset, MemoryPart, TensorPart
from bigbatch.data.custom import load_custom
from bigbatch.data.reader import Reader
from bigbatch.spec import Spec
from bigbatch.tasks import BaseTask
from train.assembled import assembled

RECIPE = {
    "duration": "1ep",
    "batch": {"global": 8},
    "optim": {"name": "sgd", "lr": 0.1},
    "task": {"name": "custom", "target": "mine:Fit"},
    "data": {"name": "custom", "target": "mine:rows"},
    "checkpoint": {"best": "loss"},
    "tracking": {"console": "none"},
}
MINE = """
from pathlib import Path
Path("was_here").touch()
from custom.test_custom import Fit, rows
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setenv(ALLOW, "0")  # which --allow-custom may change
    Path("mine.py").write_text(MINE)
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return Path("recipe.yaml")


@pytest.mark.parametrize("verb", ["train", "verify", "launch", "slurm", "plan"])
def test_nothing_of_it_is_imported_without_consent(verb: str, recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([verb, str(recipe)]) == 2
    said = capfd.readouterr().err
    assert "data.target = 'mine:rows'" in said and "--allow-custom" in said and ALLOW in said
    assert not Path("was_here").exists() and "mine" not in sys.modules


def test_a_plan_with_a_size_needs_no_consent(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "data.size=40"]) == 0
    assert main(["slurm", str(recipe), "data.size=40"]) == 2
    assert main(["train", str(recipe), "data.name=digits", "data.target=null"]) == 2
    assert not Path("was_here").exists()


def test_the_batch_script_hands_consent_on(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", str(recipe), "data.size=40", "--allow-custom"]) == 0
    assert '\nset -- recipe.yaml data.size=40 --allow-custom "$@"\n' in capsys.readouterr().out


def test_with_consent_it_is_found_in_the_current_directory(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "run.dir=run", "--allow-custom"]) == 0
    assert main(["evaluate", "run", "--allow-custom"]) == 0
    assert '"loss": ' in capsys.readouterr().out and Path("was_here").exists()


# --------------------------------------------------------------------------------- what they may get wrong


def rows(*, seed: int, count: int = 40, kind: str = "plain", wrong: str = "") -> object:
    made = {"x": torch.rand(count, 3), "y": torch.rand(count)}
    part = TensorPart(made)
    if wrong == "raises":
        raise KeyError("disk")
    if wrong == "rows":
        part = Short(made)
    if wrong == "later":
        part = Later(made)
    if wrong == "floats":
        part = MemoryPart(torch.rand(count, 1, 8, 8), torch.zeros(count, dtype=torch.int64))
    if wrong == "list":
        return [made]
    return Dataset(part, part, part, Spec((3,)), kind=kind)  # type: ignore[arg-type]


class Short(TensorPart):
    def gather(self, index, epoch=None):
        return {name: column[:-1] for name, column in super().gather(index).items()}


class Later(TensorPart):
    def gather(self, index, epoch=None):
        return {**super().gather(index), "z": torch.ones(len(index)) / (1 // int(index.min() < 9))}


class Fit(BaseTask):
    def __init__(self, spec: Spec, wrong: str = "") -> None:
        self.spec, self.wrong = spec, wrong
        if wrong == "name":
            self.metric_names = ("mse",)

    def build_model(self):
        return torch.nn.Linear(*self.spec.shape, 1) if self.wrong != "model" else "a model"

    def loss(self, model, batch):
        if self.wrong == "raises":
            raise KeyError("target")
        errors = (model(batch["x"])[:, 0] - batch["y"]).square()
        if self.wrong == "weight":
            return errors.mean(), errors.new_tensor(1)
        return errors.mean() if self.wrong == "mean" else (errors.sum(), errors.new_tensor(len(errors)))

    def evaluate(self, model, batch):
        return {**super().evaluate(model, batch), **({"more": torch.zeros(())} if self.wrong == "sums" else {})}

    def metrics(self, sums):
        return {} if self.wrong == "metrics" else super().metrics(sums)


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW, "1")


HERE = "custom.test_custom"


def load(target: str = "rows", **settings: object) -> Dataset:
    return load_custom(CustomData.model_validate({"name": "custom", "target": f"{HERE}:{target}", **settings}), seed=0)


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target": "nothing"}, r"importing .* failed: AttributeError: .*'nothing'"),
        ({"target": "RECIPE"}, "is {.*; name a function or a class"),
        (
            {"options": {"wrong": "raises"}},
            rf"the call with seed=0 .* failed: KeyError: 'disk', line \d+ of {__file__}",
        ),
        ({"options": {"typo": 1}}, "failed: TypeError: .*'typo'"),
        ({"options": {"wrong": "list"}}, "gives a list; return a bigbatch.data.Dataset"),
        ({"options": {"wrong": "rows"}}, r"gather\(\) of its train part gives x float32 \(0, 3\) on cpu; return"),
        ({"options": {"count": 0}}, "its train part has no sample"),
        ({"options": {"kind": "text"}}, "kind plain"),
        ({"options": {"kind": "image"}}, "no image; give images as uint8"),
        ({"options": {"kind": "image", "wrong": "floats"}}, r"image float32 \(1, 1, 8, 8\) on cpu; give"),
        ({"augment": {"flip": True}}, "data.augment: is for images, and .* of kind plain; remove it"),
        ({"transforms": ["RandomHorizontalFlip"]}, "data.transforms: is for images"),
    ],
)
def test_datasets_that_are_none(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^(data\.target = '{HERE}:\w+': .*)?{reason}"):
        load(**settings)  # type: ignore[arg-type]


@pytest.mark.usefixtures("allowed")
def test_samples_that_fail_later_are_named() -> None:
    part = load(options={"wrong": "later"}).train
    with pytest.raises(DataError, match=r"train part for samples 9, 10, 11 … failed: ZeroDivisionError: .*, line \d+"):
        part.gather(torch.arange(9, 20), torch.zeros(11))


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("name", r"metric_names are \('mse',\); one must be loss"),
        ("model", r"build_model\(\) gives 'a model'; return a torch.nn.Module"),
        ("raises", r"loss\(\) failed: KeyError: 'target', line \d+"),
        ("mean", r"loss\(\) gives tensor.*; return two 0-dim tensors"),
        ("weight", r".*loss\(\) of 2 samples gives a weight of 1; give their number, or set weight_is_count"),
        ("sums", r"evaluate\(\) gives .*; return a 0-dim tensor for each of sums = \('loss', 'weight'\)"),
        ("metrics", r"metrics\(\) gives {}; return a number for each of \('loss',\)"),
    ],
)
def test_tasks_that_are_none(wrong: str, reason: str) -> None:
    task = {"name": "custom", "target": f"{HERE}:Fit", "options": {"wrong": wrong}}
    data = {"name": "custom", "target": f"{HERE}:rows"}
    with pytest.raises(ValueError, match=rf"task.target = '{HERE}:Fit'.*: {reason}"):
        assembled(task=task, data=data, checkpoint={"best": "loss"}, batch={"global": 8})


@pytest.mark.usefixtures("allowed")
def test_a_task_without_methods_is_told_which() -> None:
    with pytest.raises(ValueError, match=r"gives a Spec without sums, .*, metrics; .*BaseTask"):
        assembled(task={"name": "custom", "target": f"{HERE}:Spec"})


@pytest.mark.usefixtures("allowed")
def test_parts_that_cannot_be_sent_to_workers() -> None:
    part = load().train
    object.__setattr__(part, "part", lambda: None)
    with pytest.raises(DataError, match=r"data.workers = 1: .* pickle"):
        Reader(Dataset(part, part, part, Spec((3,)), kind="plain"), workers=1, pin=False).start(
            "train", torch.arange(2)
        )
