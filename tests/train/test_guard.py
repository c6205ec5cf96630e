"""Processes that are no longer in the same run are named, and stopped before a checkpoint is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from bigbatch.cli import main
from bigbatch.train import Clock, RunError, assemble, check_ranks
from ranks import run_ranks
from runs.command import events
from train.assembled import BASE


def guarded(rank: int, odd: int, change: str) -> str | None:
    """What the guard of this rank says after ``change`` on the ``odd`` rank."""
    from bigbatch.config import RunConfig
    from bigbatch.dist import Runtime
    from bigbatch.plan import resolve

    config = RunConfig.model_validate(BASE)
    plan = resolve(config, world_size=torch.distributed.get_world_size(), dataset_size=1085)
    parts, clock = assemble(config, plan, Runtime(precision="fp64")), Clock(samples=960, step=10)
    weight = parts.model.get_parameter("stages.0.conv1.weight").data
    if change == "signs":
        weight[0, 0, 0, 0] = -weight[0, 0, 0, 1]
    if rank == odd:
        if change == "bit":
            weight.view(torch.int64)[0, 0, 0, 0] ^= 1
        elif change == "order":
            weight.copy_(weight.flip(0).clone())
        elif change == "signs":
            weight[0, 0, 0, :2] *= -1
        elif change == "buffer":
            parts.model.get_buffer("norm.running_var")[3] += 1e-9
        elif change == "plan":
            parts = dataclasses.replace(parts, plan=dataclasses.replace(plan, eval_every=7))
        elif change == "data":
            parts.loader.dataset = dataclasses.replace(parts.loader.dataset, digest="other")
        elif change == "clock":
            clock.samples += 96
    try:
        check_ranks(parts, clock, parts.model.state_dict())
    except RunError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("world", "odd", "change", "what"),
    [
        (3, 2, "bit", "rank 2 of 3 differs from the others in stages.0.conv1.weight; "),
        (3, 1, "order", "rank 1 of 3 differs from the others in stages.0.conv1.weight; "),
        (3, 1, "signs", "rank 1 of 3 differs from the others in stages.0.conv1.weight; "),
        (3, 0, "buffer", "rank 0 of 3 differs from the others in norm.running_var; "),
        (2, 1, "plan", "rank 1 of 2 differs from the others in the plan; "),
        (2, 1, "data", "rank 1 of 2 differs from the others in the data; "),
        (3, 1, "clock", "rank 1 of 3 differs from the others in the clock; "),
        (2, 1, "nothing", ""),
    ],
)
def test_the_odd_rank_and_what_differs_are_named_on_every_rank(world: int, odd: int, change: str, what: str) -> None:
    said = run_ranks(world, guarded, odd, change)
    if what:
        assert len(set(said)) == 1 or change == "clock"  # each tells its own step
        assert all(what in str(message) for message in said)
    else:
        assert said == [None] * world


def trains(rank: int, recipe: str, when: str) -> int:
    """A run in which rank 1 loses a bit at step 7, or finds another checkpoint than the others when it resumes."""
    import bigbatch.train.loop as loop

    step = loop.train_step

    def faulty(parts: Any, **arguments: Any) -> Any:
        report = step(parts, **arguments)
        if rank == 1 and when == "step" and arguments["samples"] == 6 * 96:
            parts.model.get_parameter("head.bias").data[2] *= 1 + 1e-15
        return report

    with patch.object(loop, "train_step", faulty):
        if when == "resume":
            load = loop.Saved.model

            def other(saved: Any) -> dict[str, torch.Tensor]:
                tensors = load(saved)
                return {name: t + 1e-9 if rank == 1 and "head" in name else t for name, t in tensors.items()}

            with patch.object(loop.Saved, "model", other):
                return main(["train", recipe])
        return main(["train", recipe])


def test_no_checkpoint_is_written_after_a_rank_came_apart(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    run = {"run": {"dir": str(tmp_path / "run")}, "checkpoint": {"every": "4st"}, "tracking": {"console": "none"}}
    recipe.write_text(json.dumps(BASE | run))
    assert run_ranks(2, trains, str(recipe), "step") == [1, 1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000004"]
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run_ranks(2, trains, str(recipe), "resume") == [1, 1]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics, "not a step was taken"
    assert run_ranks(2, trains, str(recipe), "never") == [0, 0]
    assert (tmp_path / "run" / "summary.json").is_file()


def own_norm(rank: int, recipe: str) -> int:
    return main(["train", recipe])


def test_buffers_that_are_each_process_s_own_are_no_alarm_but_a_warning(tmp_path: Path) -> None:
    """EvoNorm-B0 keeps running statistics that bigbatch knows nothing of."""
    recipe = tmp_path / "recipe.yaml"
    task = {"name": "classification", "model": "timm/test_efficientnet", "options": {"norm_layer": "evonormb0"}}
    run = {"run": {"dir": str(tmp_path / "run")}, "task": task, "duration": "6st", "tracking": {"console": "none"}}
    recipe.write_text(json.dumps(BASE | run | {"norm": {"kind": "batch"}, "precision": "fp32"}))
    assert run_ranks(2, own_norm, str(recipe)) == [0, 0]
    assert "buffers_by_layout" in [e["code"] for e in events(tmp_path / "run", "warning")]
