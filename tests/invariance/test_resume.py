"""A run that goes on with other numbers of processes ends as the one that never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bigbatch.cli import main
from ranks import run_ranks
from runs.command import events, summary

RECIPE: dict[str, Any] = {
    "seed": 4,
    "duration": "4ep",
    "batch": {"global": 48},
    "optim": {"name": "lamb", "lr": 0.01, "weight_decay": 0.01},
    "warmup": {"kind": "gradual", "duration": "1.5ep", "start": "zero"},
    "decay": {"kind": "multistep", "by": "batch", "at": ["2.2ep", "3.5ep"], "factor": 0.5},
    "clip": {"kind": "norm", "max": 1.0},
    "norm": {"kind": "batch", "span": 4},
    "task": {
        "name": "classification", "model": "bigbatch/resnet_small", "options": {"widths": [4, 8]},
        "class_weights": [1, 2, 1, 1, 1, 0.5, 1, 1, 3, 1],
    },
    "data": {
        "name": "digits", "augment": {"shift": 1, "erase": 0.3, "mixup": 0.3, "cutmix": 1.0}, "shuffle": 300,
        "preprocess": {"whiten": "zca", "eps": 0.1},
    },
    "checkpoint": {"every": "1ep"},
    "tracking": {"console": "none"},
    "precision": "fp64",
}  # fmt: skip

# Processes, what lies where, and where the run stops: within the warmup, in the middle of epochs, after the batch has
# grown once.
CHAIN = ((4, "ddp", "700ex"), (2, "fsdp2", "1900ex"), (1, "ddp", "3000ex"), (3, "zero1", None))


def go(rank: int, recipe: str, run: str, stop: str | None, strategy: str = "ddp") -> int:
    stopping = [f"run.stop_after={stop}"] if stop else []
    return main(["train", recipe, f"run.dir={run}", f"parallel.strategy={strategy}", *stopping])


def test_four_two_one_three_processes_are_the_run_that_never_stopped(tmp_path: Path) -> None:
    recipe, whole, chain = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "chain"
    recipe.write_text(json.dumps(RECIPE))
    assert run_ranks(1, go, str(recipe), str(whole), None) == [0]
    for world, strategy, stop in CHAIN:
        assert run_ranks(world, go, str(recipe), str(chain), stop, strategy) == [0] * world

    ours, theirs = events(chain, "step"), events(whole, "step")
    assert [e["step"] for e in ours] == [e["step"] for e in theirs] == list(range(1, len(ours) + 1))
    assert sorted({e["global_batch"] for e in ours[:-1]}) == [48, 96, 192]
    for mine, its in zip(ours, theirs, strict=True):
        for name in ("samples", "lr", "epoch", "global_batch"):
            assert mine[name] == its[name]
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(its[name], rel=1e-9)
    # Each start went on in the middle of something: of the warmup, of an epoch, of the second stage of the batch.
    resumed = [e["samples"] for e in events(chain, "resume")]
    assert len(resumed) == 3 and all(samples % 1085 for samples in resumed)
    assert resumed[0] < 1.5 * 1085 and 2.2 * 1085 < resumed[2] < 3.5 * 1085

    weights, wanted = (load_file(max((run / "checkpoints").iterdir()) / "model.safetensors") for run in (chain, whole))
    for name, tensor in wanted.items():
        away = float((weights[name].double() - tensor.double()).norm())
        assert away <= 1e-9 * float(tensor.double().norm()), name
    for name, value in summary(whole)["metrics"].items():
        assert summary(chain)["metrics"][name] == pytest.approx(value, rel=1e-9)
    assert summary(chain)["world_size"] == 3


def test_debug_replays_a_run_of_many_processes_step_for_step(tmp_path: Path) -> None:
    """Batch norm synchronised over two ranks, on one process at the same global batch."""
    recipe, large, replay = tmp_path / "recipe.yaml", tmp_path / "large", tmp_path / "replay"
    sync = {"norm": {"kind": "batch", "span": 24}, "batch": {"global": 48, "micro": 12}, "duration": "2ep"}
    plain = {"decay": {"kind": "cosine"}, "parallel": {"expect_world_size": 4}}
    recipe.write_text(json.dumps(RECIPE | sync | plain))
    assert run_ranks(4, go, str(recipe), str(large), "20st") == [0] * 4
    try:
        assert main(["train", str(recipe), f"run.dir={replay}", "run.stop_after=20st", "debug=true"]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
        torch.autograd.set_detect_anomaly(False)
    plan = json.loads((replay / "plan.json").read_text())
    assert (plan["world_size"], plan["micro_batch"], plan["accumulation"], plan["bn_span"]) == (1, 24, 2, 24)
    for mine, its in zip(events(replay, "step"), events(large, "step"), strict=True):
        assert (mine["step"], mine["samples"], mine["lr"]) == (its["step"], its["samples"], its["lr"])
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-9)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-9)
