"""Weights to start from, a new last layer, frozen parameters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bigbatch.cli import main
from bigbatch.config import ConfigError
from bigbatch.dist import Runtime
from bigbatch.train import Parts, evaluate, finetune, train_step
from bigbatch.train.finetune import fitted
from ranks import run_ranks
from train.assembled import assembled

RECIPE = """
duration: 1ep
batch: {global: 96}
optim: {name: sgd, lr: 0.1}
task: {name: classification, model: bigbatch/resnet_small, options: {widths: [8, 16]}}
data: {name: digits}
checkpoint: {every: 4st, keep: 9}
tracking: {console: none}
"""
OTHER = {"name": "synthetic", "shape": [1, 8, 8], "classes": 5}
HEAD = {"head.weight", "head.bias"}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that others start from."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert main(["train", str(folder / "recipe.yaml"), f"run.dir={folder}/run"]) == 0
    return folder / "run"


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def weights_of(run: Path) -> State:
    return load_file(newest(run) / "model.safetensors")


def started(**task: Any) -> Parts:
    return assembled(task=task, precision="fp32")


def equal(state: State, other: State) -> set[str]:
    """The names of what is the same in both."""
    return {name for name, tensor in state.items() if name in other and tensor.equal(other[name])}


@pytest.mark.parametrize("what", ["run", "checkpoint", "file", "folder"])
def test_a_run_starts_from_another(what: str, run: Path, tmp_path: Path) -> None:
    shutil.copy(newest(run) / "model.safetensors", tmp_path)
    path = {"run": run, "checkpoint": newest(run), "file": tmp_path / "model.safetensors", "folder": tmp_path}[what]
    state = weights_of(run)
    assert equal(started(weights=str(path)).model.state_dict(), state) == state.keys()


def test_a_new_head_is_that_of_the_seed_and_the_rest_the_others(run: Path) -> None:
    afresh, state = assembled(data=OTHER, precision="fp32").model.state_dict(), weights_of(run)
    task = {"weights": str(run), "head": "replace"}
    ours = assembled(data=OTHER, task=task, precision="fp32").model.state_dict()
    assert equal(ours, state) == state.keys() - HEAD
    assert equal(ours, afresh) >= HEAD
    # of as many classes too
    assert equal(started(**task).model.state_dict(), state) == state.keys() - HEAD


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"data": OTHER}, r"in other shapes head.bias of \(10,\) for \(5,\), .*; set task.head=replace"),
        ({"task": {"options": {"widths": [8, 17]}}}, r"in other shapes .* more; give those of the same model"),
        ({"task": {"options": {"widths": [8, 16, 32]}}}, r"lack stages.2.* and \d+ more; .* the same model"),
        ({"task": {"options": {"widths": [8]}}}, r"have besides stages.1.* and \d+ more"),
    ],
)
def test_weights_of_another_model(sections: dict[str, Any], reason: str, run: Path) -> None:
    sections = {**sections, "task": {**sections.get("task", {}), "weights": str(run)}}
    with pytest.raises(ConfigError, match=rf"task.weights = '{run}': they .*{reason}"):
        assembled(**sections)


def test_another_kind_of_norm(run: Path, tmp_path: Path) -> None:
    group, state = {"kind": "group", "groups": 4}, weights_of(run)
    converted = assembled(task={"weights": str(run)}, norm=group, precision="fp32").model.state_dict()
    assert equal(converted, state) == converted.keys()
    file = tmp_path / "group.safetensors"
    save_file(dict(converted), file)
    again = assembled(task={"weights": str(file)}, norm=group, precision="fp32").model.state_dict()
    assert equal(again, converted) == converted.keys()
    with pytest.raises(ConfigError, match=r"they lack norm.running_mean, .*; set norm.kind to what"):
        started(weights=str(file))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone", "there is no .*gone; give a run or checkpoint directory, or a .safetensors file"),
        ("weights.pt", "a file that may run code is not opened; give"),
        ("weights.safetensors", "cannot be read on .*: "),
        ("folder", "there is no .*model.safetensors; give"),
        ("run", "no checkpoint yet"),
        ("damaged", "is damaged: model.safetensors"),
    ],
)
def test_weights_that_cannot_be_read(name: str, reason: str, run: Path, tmp_path: Path) -> None:
    for file in ("weights.pt", "weights.safetensors", "folder/pytorch_model.bin", "run/checkpoints/notes"):
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).write_bytes(b"no weights")
    shutil.copytree(newest(run), tmp_path / "damaged")
    with (tmp_path / "damaged/model.safetensors").open("ab") as file:
        file.write(b".")
    with pytest.raises(ConfigError, match=f"task.weights.*{reason}"):
        started(weights=str(tmp_path / name))


def test_a_run_goes_on_without_what_it_started_from(run: Path, tmp_path: Path) -> None:
    source = shutil.copytree(run, tmp_path / "source")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    tune = ["train", str(recipe), f"task.weights={source}", "task.head=replace", "task.freeze=[^conv, ^norm]"]
    assert main([*tune, f"run.dir={tmp_path}/whole"]) == 0
    assert main([*tune, f"run.dir={tmp_path}/run", "run.stop_after=4st"]) == 0
    shutil.rmtree(source)
    assert main([*tune, f"run.dir={tmp_path}/run"]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    whole = weights_of(tmp_path / "whole")
    assert equal(weights_of(tmp_path / "run"), whole) == whole.keys()
    assert main([*tune, f"run.dir={tmp_path}/run", "task.freeze=[^conv]"]) == 2
    assert main([*tune, f"run.dir={tmp_path}/new"]) == 2


# ------------------------------------------------------------------------------------------- frozen parameters


def test_what_is_frozen_stays(run: Path) -> None:
    parts, before = started(weights=str(run), head="replace", freeze=["^(?!head)"]), weights_of(run)
    for samples in (0, 96):
        train_step(parts, samples=samples)
        evaluate(parts, "validation")  # after which the model is in training mode
    after = parts.model.state_dict()
    assert equal(after, before) == after.keys() - HEAD
    assert not any(module.training for module in parts.model.modules() if isinstance(module, nn.BatchNorm2d))


def test_a_batch_norm_with_a_free_parameter_goes_on(run: Path) -> None:
    parts, before = started(weights=str(run), freeze=["norm1?.weight", "stages.0.norm1"]), weights_of(run)
    train_step(parts, samples=0)
    same = equal(parts.model.state_dict(), before)
    assert {"norm.weight", *(f"stages.0.norm1.{name}" for name in ("weight", "bias", "running_mean"))} <= same
    assert not same & {"norm.bias", "norm.running_mean", "stages.0.norm2.weight"}


@pytest.mark.parametrize(
    ("freeze", "reason"),
    [
        (["^stem"], r"'\^stem' matches no parameter; there are conv.weight, norm.weight, norm.bias and \d+ more"),
        (["("], r"'\(' is no regular expression"),
        (["."], "nothing is left to train"),
    ],
)
def test_freezing_what_cannot_be(freeze: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=f"task.freeze.*{reason}"):
        assembled(task={"freeze": freeze})


def tuned(rank: int, strategies: list[str], weights: str) -> list[tuple[State, float]]:
    found, task = [], {"weights": weights, "head": "replace", "freeze": ["^conv", "^norm", "stages.0"]}
    for strategy in strategies:
        parts = assembled(task=task, parallel={"strategy": strategy}, batch={"micro": 24})
        for step in range(3):
            train_step(parts, samples=96 * step)
        parts.stats.merge(parts.runtime.sum, parts.runtime.rank)
        found.append((dict(parts.strategy.model_state()), evaluate(parts, "validation")["loss"]))
    return found


def alone(rank: int, weights: str) -> list[str]:
    """What each process says where only one of them fails."""
    runtime, said = Runtime(), list[str]()
    for failing in (0, 1):
        try:
            with runtime.first_on_this_machine():
                said.append("begun")
                if rank == failing:
                    raise ValueError(f"rank {rank} fails")
        except ValueError as error:
            said.append(str(error))
    for mine in ("gone", "other"):
        if rank == 1:
            finetune.load_file = {"gone": lambda file: load_file("gone"), "other": lambda file: {}}[mine]
        try:
            started(weights=weights)
        except ConfigError as error:
            said.append(str(error))
    return said


def both(rank: int, weights: str) -> tuple[list[tuple[State, float]], list[str]]:
    return tuned(rank, ["ddp", "zero1", "fsdp2"], weights), alone(rank, weights)


@pytest.fixture(scope="module")
def two(run: Path) -> list[Any]:
    """What two processes find, which are slow to start."""
    return run_ranks(2, both, str(run))


def test_every_strategy_tunes_alike(run: Path, two: list[Any]) -> None:
    ((known, expected),) = tuned(0, ["ddp"], str(run))
    for state, loss in two[0][0]:
        assert loss == pytest.approx(expected, rel=1e-10)
        for name, tensor in known.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-9, atol=1e-12)


def test_what_one_process_cannot_read_ends_all(two: list[Any]) -> None:
    (_, first), (_, second) = two
    assert first[:4] == ["begun", "rank 0 fails", "begun", "rank 1 fails"]
    assert second[:3] == ["rank 0 fails", "begun", "rank 1 fails"], "it did not even begin"
    assert first[4:] == second[3:]
    assert "cannot be read on " in first[4] and "they lack conv.weight" in first[5]


# ------------------------------------------------------------------------------------------- pretrained, last layers


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    """What is kept of timm's hub, with one model there."""
    torch.manual_seed(3)
    state = dict(timm.create_model("test_resnet").state_dict())
    kept = tmp_path / "models--timm--test_resnet.r160_in1k"
    for folder, name in (("refs", "main"), ("snapshots", "abc/model.safetensors")):
        (kept / folder / name).parent.mkdir(parents=True)
    (kept / "refs/main").write_text("abc")
    save_file(state, kept / "snapshots/abc/model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return state


@pytest.mark.parametrize("model", ["test_resnet", "test_resnet.r160_in1k"])
def test_pretrained_weights_of_timm(model: str, hub: State) -> None:
    task = {"model": f"timm/{model}", "options": {}, "weights": "pretrained", "head": "replace"}
    state = assembled(task=task, data=OTHER, precision="fp32").model.state_dict()
    assert equal(state, hub) == state.keys() - {"conv1.0.weight", "fc.weight", "fc.bias"}
    torch.testing.assert_close(state["conv1.0.weight"], hub["conv1.0.weight"].sum(1, keepdim=True))
    with pytest.raises(ConfigError, match=r"have in other shapes fc.*; set task.head=replace"):
        assembled(task=task | {"head": "keep"}, data=OTHER)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"model": "timm/test_efficientnet"}, r"timm/test_efficientnet: its weights cannot be had \("),
        (
            {"model": "timm/test_vit.mine"},
            "'timm/test_vit.mine': unknown; did you mean timm/test_vit.*r160_in1k",
        ),
        ({"model": "bigbatch/resnet_small"}, "task.weights = pretrained: bigbatch/resnet_small has none; give a run"),
    ],
)
def test_pretrained_weights_that_are_none(task: dict[str, Any], reason: str, hub: State) -> None:
    with pytest.raises(ValueError, match=reason):
        assembled(task={"weights": "pretrained", **task, "options": {}}, data=OTHER)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.decode = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.decode.weight = self.embed.weight


def test_a_tied_weight_may_be_there_once() -> None:
    weights = {"embed.weight": torch.ones(7, 3)}
    assert fitted(Tied(), weights, head="keep", norm="batch") == weights
    with pytest.raises(ValueError, match=r"decode.weight is another layer's weight too; use task.head=keep"):
        fitted(Tied(), weights, head="replace", norm="batch")
