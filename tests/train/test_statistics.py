"""Who takes the statistics, of what, and that they stay with the run."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bigbatch.cli import main
from bigbatch.config.models import Digits, Preprocess
from bigbatch.data import DataError, Dataset, Loader, PlainPipeline, Stream, load_data, permute
from bigbatch.dist import RankError, Runtime
from bigbatch.keyed import fold
from bigbatch.spec import Spec
from bigbatch.train import statistics
from ranks import run_ranks
from runs.command import events, summary
from train.assembled import assembled

WHITEN = Preprocess(whiten="zca", eps=0, keep=0.95)
EXTREMES = Preprocess(rescale="minmax", center="feature", scale="all")
SHAPE = (1, 4, 4)


class Numbers:
    """Images that are a function of their number; one of them cannot be read."""

    def __init__(self, size: int, *, broken: int | None = None) -> None:
        some = np.random.default_rng(0).gamma(2, 20, (size, *SHAPE)).clip(0, 255)
        self.images = torch.from_numpy(some).to(torch.uint8)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, index: Tensor, epoch: Tensor | None = None) -> dict[str, Tensor]:
        assert epoch is None, "nothing random"
        if self.broken in index.tolist():
            raise DataError(f"image {self.broken} is broken")
        return {"image": self.images[index], "label": torch.zeros(len(index), dtype=torch.int64)}


class Untouchable(Numbers):
    def gather(self, index: Tensor, epoch: Tensor | None = None) -> dict[str, Tensor]:
        raise AssertionError("read")


def fit(config: Preprocess, part: Numbers, *, workers: int = 0, seed: int = 0) -> dict[str, Tensor]:
    data = Dataset(part, Untouchable(5), Untouchable(5), Spec(SHAPE, 10))
    runtime = Runtime()
    pipeline = PlainPipeline(seed=seed, device=runtime.device, dtype=torch.float64)
    loader = Loader(data, stream=Stream(len(part), seed=0, epoch_samples=len(part)), pipeline=pipeline, workers=workers)
    try:
        return statistics.fit(config, loader, runtime, seed=seed, batch=7)[0]
    finally:
        loader.close()


def of_each(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    found = fit(WHITEN, Numbers(90)), fit(EXTREMES, Numbers(90))
    try:
        fit(WHITEN, Numbers(90, broken=80))
    except DataError as error:
        return *found, str(error)
    raise AssertionError("no error")


def test_four_processes_find_what_one_finds() -> None:
    expected = [fit(config, Numbers(90)) for config in (WHITEN, EXTREMES)]
    for *found, error in run_ranks(4, of_each):
        for ours, states in zip(found, expected, strict=True):
            assert all(torch.equal(ours[name], tensor) for name, tensor in states.items())
        assert error == "image 80 is broken", "all say so, and none waits"


def test_workers_find_the_same() -> None:
    found, expected = fit(WHITEN, Numbers(90), workers=2), fit(WHITEN, Numbers(90))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_share_of_the_samples_is_chosen_by_the_seed() -> None:
    part, config = Numbers(90), Preprocess(center="feature", scale="all", samples=20)
    chosen = permute(np.arange(20), 90, fold(3, -2))
    few = Numbers(20)
    few.images = part.images[np.sort(chosen)]
    found, expected = fit(config, part, seed=3), fit(config.model_copy(update={"samples": "all"}), few)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(found["shift"], fit(config, part, seed=4)["shift"])
    with pytest.raises(ValueError, match=r"data\.preprocess\.samples = 91: the training part has 90"):
        fit(config.model_copy(update={"samples": 91}), part)


def test_no_more_is_read_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(Preprocess(rescale="symmetric", center="none", scale="none"), Untouchable(90))["shift"] == -1
    monkeypatch.setattr(statistics, "_moments", lambda *_, **__: pytest.fail("read what is known"))
    digits = load_data(Digits(name="digits"), seed=0)
    pipeline = PlainPipeline(seed=0, device=torch.device("cpu"), dtype=torch.float64)
    loader = Loader(digits, stream=Stream(1085, seed=0, epoch_samples=1085), pipeline=pipeline)
    statistics.fit(Preprocess(rescale="symmetric", center="none"), loader, Runtime(), seed=0, batch=99)


def test_too_many_features_to_whiten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "LARGEST", 15)
    with pytest.raises(ValueError, match=r"data\.preprocess\.whiten = zca: the covariance of 16 features is too large"):
        fit(WHITEN, Numbers(90))


# --------------------------------------------------------------------------------------- with the run

RECIPE: dict[str, Any] = {
    "duration": "2ep",
    "batch": {"global": 5},
    "optim": {"name": "sgd", "lr": 0.01},
    "task": {"name": "classification", "model": "bigbatch/mlp", "options": {"widths": [8]}},
    "data": {"name": "idx", "validation": 5, "preprocess": {"whiten": "pca", "keep": 0.8}},
    "checkpoint": {"keep": 9},
    "tracking": {"console": "none"},
}


def idx(folder: Path, *, seed: int = 0, rank: int = 30, parts: tuple[str, ...] = ("train", "t10k")) -> None:
    """Idx files of 15 training and 5 validation or 20 test images, which vary in ``rank`` directions at most."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for name in parts:
        values = rng.integers(0, 256, (20, rank)) @ rng.dirichlet([1] * rank, 30).T
        for kind, array in (("images-idx3", values.reshape(20, 6, 5)), ("labels-idx1", np.arange(20) % 4)):
            content = array.astype(np.uint8)
            head = (0x800 + content.ndim).to_bytes(4, "big") + b"".join(e.to_bytes(4, "big") for e in content.shape)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + content.tobytes()))


def evaluated(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", str(path), "--split", "test"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_a_run_keeps_its_statistics_though_its_files_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run, files = tmp_path / "recipe.yaml", tmp_path / "run", tmp_path / "idx"
    recipe.write_text(json.dumps(RECIPE))
    go = ["train", str(recipe), f"run.dir={run}", f"data.path={files}"]
    idx(files)
    assert main([*go, "run.stop_after=2st"]) == 0
    kept = (run / "preprocess.safetensors").read_bytes()
    (first,) = (run / "checkpoints").iterdir()
    assert (first / "preprocess.safetensors").read_bytes() == kept
    components = load_file(run / "preprocess.safetensors")["matrix"].shape[1]

    before = evaluated(run, capsys)
    idx(files, seed=1, rank=2, parts=("train",))  # which would have fewer components
    (run / "preprocess.safetensors").unlink()
    assert evaluated(first, capsys) == before, "neither the test part nor what is applied to it has changed"
    assert main(go) == 0
    last = max((run / "checkpoints").iterdir())
    assert last.name == "00000006" and (last / "preprocess.safetensors").read_bytes() == kept
    assert (run / "preprocess.safetensors").read_bytes() == kept
    assert load_file(last / "model.safetensors")["layers.1.weight"].shape == (8, components)
    assert evaluated(run, capsys)["loss"] == pytest.approx(summary(run)["metrics"]["loss"], rel=1e-5)

    fresh = tmp_path / "fresh"
    assert main(["train", str(recipe), f"run.dir={fresh}", f"data.path={files}", "run.stop_after=1st"]) == 0
    assert load_file(fresh / "preprocess.safetensors")["matrix"].shape[1] < components
    capsys.readouterr()
    assert main([*go, "data.preprocess.keep=3"]) == 2
    assert "data.preprocess.keep = 3: the run in" in capsys.readouterr().err
    assert main(["evaluate", str(run), "data.preprocess.keep=3"]) == 2
    assert "data.preprocess: evaluate applies" in capsys.readouterr().err


def test_features_that_do_not_vary_are_counted_and_vectors_need_their_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    data = {"name": "digits", "preprocess": {"center": "feature", "scale": "feature"}}
    recipe.write_text(json.dumps(RECIPE | {"data": data, "batch": {"global": 96}}))
    assert main(["train", str(recipe), f"run.dir={run}", "run.stop_after=1st"]) == 0
    (warning,) = (event for event in events(run, "warning") if event["code"] == "constant_features")
    assert re.search(r"3 of 64 features are constant", warning["message"])
    capsys.readouterr()
    pca = ["data.preprocess={whiten: pca, keep: 12}", "task.model=bigbatch/resnet_small", "task.options={}"]
    assert main(["train", str(recipe), f"run.dir={tmp_path / 'other'}", *pca]) == 2
    assert "whiten = pca gives vectors of 12; use bigbatch/mlp" in capsys.readouterr().err


def assemble_in_vain(rank: int) -> None:
    assembled(data={"workers": 1, "preprocess": {"whiten": "zca", "keep": 64}})


def test_processes_that_read_end_where_nothing_can_be_assembled() -> None:
    """They would keep this process from its end, and with it the launcher."""
    with pytest.raises(RankError, match=r"data\.preprocess\.keep = 64"):
        run_ranks(1, assemble_in_vain)
