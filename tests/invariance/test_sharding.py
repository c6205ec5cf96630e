"""Whatever a process holds, a run takes the same steps, and its checkpoints go on under every strategy."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from bigbatch.config import RunConfig
from bigbatch.dist import Runtime
from bigbatch.plan import resolve
from bigbatch.train import Parts, assemble, evaluate, open_newest, train_step
from bigbatch.train.checkpoint import Checkpoints
from ranks import Ranks

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lars": {"lr": 0.5, "trust_coefficient": 0.02, "weight_decay": 1e-3},
    "lamb": {"lr": 0.01, "weight_decay": 0.01},
    "sgd": {"lr": 0.1, "nesterov": True, "weight_decay": 1e-3},
    "adamw": {"lr": 0.01, "weight_decay": 0.01},
}
STEPS, BATCH, LAST = 20, 48, 7
TOLERANCE = {"fp32": 1e-6, "fp64": 1e-10}


def parts_of(optim: str, strategy: str, precision: str = "fp64") -> Parts:
    """Six samples a pass, so four processes accumulate too; the last window leaves processes without any, and some have
    an evaluation batch more than others."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    config = RunConfig.model_validate(
        {
            "duration": "3ep",
            "batch": {"global": BATCH, "micro": 6},
            "optim": {"name": optim, **OPTIMIZERS[optim]},
            "warmup": {"kind": "gradual", "duration": "50%", "start": "zero"},
            "clip": {"kind": "norm", "max": 0.5},
            "norm": {"kind": "batch", "span": 3},
            "task": {
                "name": "classification", "model": "bigbatch/resnet_small", "options": {"widths": [3, 6]},
                "class_weights": [1, 2, 1, 1, 1, 0.5, 1, 1, 3, 1],
            },
            "data": {"name": "digits"},
            "eval": {"batch": 89},
            "parallel": {"strategy": strategy},
            "precision": precision,
        }
    )  # fmt: skip
    plan = resolve(config, world_size=world, dataset_size=1085)
    plan = dataclasses.replace(plan, samples=BATCH * (STEPS - 1) + LAST)
    return assemble(config, plan, Runtime(precision=config.precision, parallel=config.parallel))


def take(parts: Parts, steps: range) -> list[float | None]:
    reports = [train_step(parts, samples=BATCH * step) for step in steps]
    parts.stats.merge(parts.runtime.sum, parts.runtime.rank)
    return [number for report in reports for number in (report.loss, report.grad_norm)]


def run(rank: int, optim: str, strategy: str, precision: str) -> Any:
    parts = parts_of(optim, strategy, precision)
    return take(parts, range(STEPS)), dict(parts.strategy.model_state()), evaluate(parts, "test")


@pytest.fixture(scope="module")
def pool() -> Iterator[dict[int, Ranks]]:
    pool = {world: Ranks(world) for world in (2, 4)}
    yield pool
    for ranks in pool.values():
        ranks.close()


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert list(ours) == list(theirs)
    away, size = (
        torch.cat([t.double().flatten() for t in tensors]).norm()
        for tensors in ([ours[name].double() - theirs[name].double() for name in ours], theirs.values())
    )
    return float(away / size)


@pytest.mark.parametrize(("world", "precision"), [(2, "fp32"), (4, "fp64")])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_sharded_run_takes_the_steps_of_replicas(
    pool: dict[int, Ranks], optim: str, world: int, precision: str
) -> None:
    wanted = pool[world](run, optim, "ddp", precision)[0]
    for strategy in ("zero1", "fsdp2"):
        found = pool[world](run, optim, strategy, precision)
        assert distance(found[0][1], wanted[1]) <= TOLERANCE[precision], strategy
        for numbers, _, metrics in found:
            assert numbers == pytest.approx(wanted[0], rel=10 * TOLERANCE[precision])
            assert metrics == pytest.approx(wanted[2], rel=10 * TOLERANCE[precision])


CHAIN = (("zero1", 2), ("fsdp2", 4), ("ddp", 1), ("fsdp2", 2), ("zero1", 4))


def leg(rank: int, optim: str, strategy: str, steps: range, root: Path) -> None:
    """Some steps from the newest checkpoint to the next one."""
    parts = parts_of(optim, strategy)
    if steps.start:
        saved = open_newest(root)
        parts.strategy.load(saved.model(), saved.optimizer())
    take(parts, steps)
    model, optimizer = parts.strategy.model_state(), parts.strategy.optimizer_state()
    if rank == 0:
        Checkpoints(root, keep=1, best="", best_is="max").save(steps.stop, model=model, optimizer=optimizer, state={})


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_checkpoint_goes_on_under_every_strategy(pool: dict[int, Ranks], optim: str, tmp_path: Path) -> None:
    leg(0, optim, "ddp", range(2 * len(CHAIN)), tmp_path / "whole")
    for number, (strategy, world) in enumerate(CHAIN):
        arguments = (optim, strategy, range(2 * number, 2 * number + 2), tmp_path / "chain")
        if world == 1:
            leg(0, *arguments)
        else:
            pool[world](leg, *arguments)
    ours, wanted = open_newest(tmp_path / "chain"), open_newest(tmp_path / "whole")
    assert distance(ours.model(), wanted.model()) <= TOLERANCE["fp64"]
    torch.testing.assert_close(ours.optimizer()["state"], wanted.optimizer()["state"], rtol=1e-8, atol=1e-10)
    names = [[group["param_names"] for group in saved.optimizer()["param_groups"]] for saved in (ours, wanted)]
    assert names[0] == names[1]


def collectives(rank: int, optim: str, strategy: str) -> Counter[str]:
    parts = parts_of(optim, strategy)
    take(parts, range(2))
    with profile() as profiler:
        train_step(parts, samples=2 * BATCH)
    return Counter(event.name.removeprefix("c10d::") for event in profiler.events() if "c10d" in event.name)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_collectives_are_counted(pool: dict[int, Ranks], optim: str) -> None:
    """All-reduces of a step: of the gradients, with the loss and its weight among them (ddp, zero1); or of loss and
    weight and of the clip norm (fsdp2), and of all trust ratios where layers are cut."""
    layerwise = optim in ("lars", "lamb")
    units, passes = 3, 4
    for strategy, wanted in {
        "ddp": {"allreduce_": 1},
        "zero1": {"allreduce_": 1, "_allgather_base_": 1},
        # The blocks are gathered for each forward and each backward pass, the root for both at once.
        "fsdp2": {
            "allreduce_": 2 + layerwise,
            "_reduce_scatter_base_": units,
            "_allgather_base_": passes * (2 * units - 1),
        },
    }.items():
        assert pool[2](collectives, optim, strategy) == [wanted] * 2, strategy
