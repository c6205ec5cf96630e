"""DeepSpeed's ZeRO 0, 1 and 2: the steps of replicas, from any layout to any other."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from bigbatch.config import RunConfig, merge
from bigbatch.config.models import Parallel
from bigbatch.dist import Runtime, deepspeed, set_layers
from bigbatch.dist.strategy import Replicas
from bigbatch.optim import LARS
from bigbatch.plan import resolve
from bigbatch.tasks import ClassificationTask
from bigbatch.train import Parts, assemble, train_step
from bigbatch.train.assemble import _check_reached
from dist.models import accumulate, odd, prepared
from ranks import Ranks

pytestmark = pytest.mark.skipif(
    not (find_spec("deepspeed") and find_spec("transformers")), reason="needs pip install 'bigbatch[deepspeed]'"
)

BASE: dict[str, Any] = {
    "duration": "1250ex",  # 20 steps, the last of a short window
    "batch": {"global": 64, "micro": 8},
    "warmup": {"kind": "gradual", "duration": "50%", "start": "zero"},
    "clip": {"kind": "norm", "max": 0.5},
    "norm": {"kind": "batch", "span": 4},
    "task": {"name": "classification", "model": "bigbatch/resnet_small", "options": {"widths": [4, 6]}},
    "data": {"name": "digits"},
}
# A group of ten numbers, of which the last of four processes gets none.
GROUPS = [{"match": r"head\.bias", "weight_decay": 0}, {"match": "bias_and_norm", "adapt": False}, {"match": "rest"}]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optim": {"name": "sgd", "lr": 0.05}, "clip": {"kind": "value", "max": 0.02}},
    "lars": {"optim": {"name": "lars", "lr": 1.0}},
    "lamb": {"optim": {"name": "lamb", "lr": 0.01, "prenormalize": True}},
    "adagrad": {"optim": {"name": "adagrad", "lr": 0.01, "initial_accumulator_value": 0.1}},
    "adamw": {"optim": {"name": "adamw", "lr": 0.003}, "clip": {"kind": "none", "max": None}},
}
NEAR = {"rtol": 0.0, "atol": 1e-6}


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    """Processes by their number, started when first asked for."""
    started: list[Ranks] = []

    @cache
    def ranks(number: int) -> Ranks:
        started.append(Ranks(number))
        return started[-1]

    yield ranks
    for each in started:
        each.close()


def sections(name: str, stage: int | None, **more: Any) -> dict[str, Any]:
    """A recipe with this optimiser under ZeRO of this stage; None is ddp."""
    parallel = {} if stage is None else {"strategy": "deepspeed", "zero_stage": stage}
    tree = merge(merge(BASE, OPTIMIZERS[name]), {"optim": {"weight_decay": 1e-3, "groups": GROUPS}})
    return merge(merge(tree, {"parallel": parallel}), more)


def parts_of(recipe: dict[str, Any]) -> Parts:
    AcceleratorState._reset_state(reset_partial_state=True)  # one run after the other in one process
    config = RunConfig.model_validate(recipe)
    plan = resolve(config, world_size=dist.get_world_size(), dataset_size=1085)
    parts = assemble(config, plan, Runtime(parallel=config.parallel, precision=config.precision))
    for module in parts.model.modules():
        if hasattr(module, "relu"):
            module.relu = nn.Softplus(beta=5)  # a kink would make another run of what is rounding
    return parts


@dataclasses.dataclass
class End:
    """What a run was at its end, on one process."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    norms: list[float]
    state_bytes: int
    samples: int


def ended(parts: Parts, samples: int, norms: list[float]) -> End:
    parts.stats.merge(parts.runtime.sum, parts.runtime.rank)
    tensors = [t for state in parts.strategy.optimizer.state.values() for t in state.values()]
    return End(
        model={name: tensor.clone() for name, tensor in parts.strategy.model_state().items()},
        optimizer=parts.strategy.optimizer_state(),
        norms=norms,
        state_bytes=sum(t.nbytes for t in tensors if t.dim()),
        samples=samples,
    )


def trained(rank: int, recipe: dict[str, Any], start: End | None = None, until: int = 2**31) -> End:
    parts = parts_of(recipe)
    samples, norms = 0, []
    if start:
        samples, start = start.samples, copy.deepcopy(start)  # pipes between processes share a tensor's memory
        parts.strategy.load(start.model, start.optimizer)
    while samples < min(parts.plan.samples, until):
        norms.append(train_step(parts, samples=samples).grad_norm)
        samples += parts.plan.window(samples)
    return ended(parts, samples, norms)


def check_same(ours: list[End], theirs: list[End]) -> None:
    for mine in ours:
        torch.testing.assert_close(mine.model, theirs[0].model, **NEAR)
        torch.testing.assert_close(mine.norms, theirs[0].norms, **NEAR)
    found, wanted = ours[0].optimizer, theirs[0].optimizer
    torch.testing.assert_close(found["state"], wanted["state"], **NEAR)
    for group in (*found["param_groups"], *wanted["param_groups"]):
        group.pop("differentiable", None)  # torch adds it while it loads
    assert found["param_groups"] == wanted["param_groups"]


@cache
def replicas(ranks: Ranks, name: str) -> list[End]:
    return ranks(trained, sections(name, None))


# Four processes: some hold no piece of the first group.
@pytest.mark.parametrize(
    ("number", "name", "stage"),
    [(2, name, stage) for name in OPTIMIZERS for stage in (1, 2)]
    + [(2, "lars", 0), (2, "lamb", 0)]
    + [(4, name, stage) for name in ("lars", "lamb") for stage in (1, 2)],
)
def test_every_optimizer_takes_the_steps_of_replicas(world: Any, number: int, name: str, stage: int) -> None:
    ours, theirs = world(number)(trained, sections(name, stage)), replicas(world(number), name)
    check_same(ours, theirs)
    total, largest = theirs[0].state_bytes, 4 * 6 * 6 * 9
    share = total if stage == 0 else max(1.1 * total / number, largest)
    assert all(end.state_bytes <= share for end in ours)


def test_a_run_goes_on_in_any_layout(world: Any) -> None:
    """Four steps in each of five layouts, each from what the one before it had on rank 0."""
    leg: End | None = None
    for until, (number, stage) in enumerate([(2, 1), (4, None), (4, 2), (2, 0), (4, 1)], start=1):
        leg = world(number)(trained, sections("lamb", stage), leg, until * 256)[0]
    assert leg
    whole = world(2)(trained, sections("lamb", None))
    check_same([dataclasses.replace(leg, norms=whole[0].norms)], whole)


def collectives(rank: int, recipe: dict[str, Any]) -> list[tuple[str, int]]:
    parts = parts_of(recipe)
    train_step(parts, samples=0)
    with torch.profiler.profile(record_shapes=True) as profile:
        train_step(parts, samples=64)
    return [(e.name, math.prod(e.input_shapes[0])) for e in profile.events() if e.name.startswith("gloo:")]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_all_trust_ratios_take_one_collective(world: Any, name: str, stage: int) -> None:
    found = world(2)(collectives, sections(name, stage))[0]
    # LAMB's prenormalize wants a norm of its own, beside the one to clip by.
    gradients = [("gloo:all_reduce", 1006)] * (1 if stage == 1 else 4)
    gradients.insert(-1, ("gloo:all_reduce", 3))  # loss, weight and stop, beside the last backward pass
    norms = [("gloo:all_reduce", 1)] * (2 if name == "lamb" else 1)
    ratios = [("gloo:all_reduce", 3 * 8)]  # of head.bias and the seven of `rest`
    weights = [("gloo:all_gather", size) for size in (6, 24, 474)]
    assert found == [*gradients, *norms, *ratios, *weights]


class Spoilt(ClassificationTask):
    """A loss that is not a number on one process, for one step."""

    steps = 0

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, weight = super().loss(model, batch)
        self.steps += 1
        bad = self.steps in range(9, 13) and dist.get_rank() == 1
        return loss * (float("nan") if bad else 1.0), weight


def skipping(rank: int, recipe: dict[str, Any]) -> tuple[End, bool, list[bool]]:
    parts = parts_of(recipe)
    task = Spoilt(parts.config.task, parts.loader.dataset.spec)
    parts = dataclasses.replace(parts, task=task)
    skipped, same = [], True
    for number in range(5):
        before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
        skipped.append(train_step(parts, samples=64 * number).skipped)
        if skipped[-1]:
            same = all(torch.equal(p, before[name]) for name, p in parts.model.named_parameters())
    return ended(parts, 320, []), same, skipped


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(world: Any, stage: int) -> None:
    theirs = [end for end, *_ in world(2)(skipping, sections("lamb", None))]
    found = world(2)(skipping, sections("lamb", stage))
    check_same([end for end, *_ in found], theirs)
    for _, same, skipped in found:
        assert same and skipped == [False, False, True, False, False]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_precision_and_compression_are_those_of_the_recipe(world: Any, stage: int) -> None:
    def weights(stage: int | None, **more: Any) -> Tensor:
        model = world(2)(trained, sections("sgd", stage, **more), None, 128)[0].model
        return torch.cat([model[name].flatten() for name in sorted(model)])

    exact, half = weights(None), weights(None, precision="bf16")
    noise = float((half - exact).norm())
    assert float((weights(stage, precision="bf16") - half).norm()) < noise / 10
    rounded = float((weights(stage, parallel={"compression": "bf16"}) - exact).norm())
    assert 1e-6 < rounded < noise


def odd_steps(rank: int, name: str, **parallel: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    AcceleratorState._reset_state(reset_partial_state=True)
    made = prepared(odd(torch.float32), {"name": name}, torch.float32, **parallel)
    for number in range(4):
        accumulate(made, number, rank=rank, world=dist.get_world_size())
        made.step()
    return dict(made.model_state()), made.optimizer_state()


def odd_steps_under(rank: int, name: str, stage: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return odd_steps(rank, name, strategy="deepspeed", zero_stage=stage)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_tied_and_frozen_weights(world: Any, stage: int) -> None:
    wanted, found = world(2)(odd_steps, "nadam")[0], world(2)(odd_steps_under, "nadam", stage)[0]
    torch.testing.assert_close(found[0], wanted[0], **NEAR)
    torch.testing.assert_close(found[1]["state"], wanted[1]["state"], **NEAR)


def refused(rank: int, what: str) -> str:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(memory_format=torch.channels_last)
    if what == "scalar":
        model.register_parameter("gain", nn.Parameter(torch.tensor(1.0)))
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        prepared(model, {"name": "sgd"}, torch.float32, strategy="deepspeed")
    except ValueError as error:
        return str(error)
    return ""


def test_a_parameter_that_the_loss_does_not_reach_is_named() -> None:
    """DeepSpeed fills in zeros, along which decay and momentum would move it."""
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "spare": nn.Linear(2, 1)})
    replicas = Replicas(
        model, torch.optim.SGD(model.parameters(), 0.1), wrap=lambda module: module, parallel=Parallel()
    )

    def passes() -> None:
        model["used"](torch.ones(1, 2)).sum().backward()

    _check_reached(replicas, passes)
    replicas.fills_gaps = True
    with pytest.raises(ValueError, match=r"does not reach spare\.weight, .*freeze it"):
        _check_reached(replicas, passes)


def test_what_cannot_be_cut_is_named(world: Any) -> None:
    assert "gain is a scalar" in world(2)(refused, "scalar")[0]
    assert world(2)(refused, "nothing")[0] == ""


LAUNCHER = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,gradient_clipping",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_GRADIENT_CLIPPING": "0.1",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
}


def launched(rank: int, recipe: dict[str, Any]) -> tuple[int, list[str]]:
    os.environ.update(LAUNCHER)
    strategy: Any = parts_of(recipe).strategy
    left = [name for name in os.environ if name.startswith("ACCELERATE_")]
    return strategy._engine.zero_optimization_stage(), left


def test_the_recipe_wins_over_the_launcher(world: Any) -> None:
    assert world(2)(launched, sections("sgd", 1)) == [(1, [])] * 2


def alone(rank: int, stage: int) -> tuple[list[Tensor], list[Tensor]]:
    """LARS under plain deepspeed.initialize with its own step, and by itself on the union of the batches."""
    import deepspeed

    def made() -> tuple[nn.Module, LARS]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))
        groups = [{"params": [*model[0].parameters()]}, {"params": [*model[2].parameters()], "weight_decay": 0.01}]
        return model, LARS(groups, 0.1, trust_coefficient=0.1)

    (model, optimizer), (wanted, reference) = made(), made()
    layers = [list(group["params"]) for group in optimizer.param_groups]
    config = {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True}
    config |= {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, dist_init_required=False, config=config)
    set_layers(optimizer, layers)
    for number in range(4):
        x = torch.randn(4 * dist.get_world_size(), 7, generator=torch.Generator().manual_seed(number))
        engine.backward(engine(x[4 * rank : 4 * rank + 4]).square().mean())
        engine.step()
        reference.zero_grad()
        wanted(x).square().mean().backward()
        reference.step()
    return [p.detach() for p in model.parameters()], [p.detach() for p in wanted.parameters()]


@pytest.mark.parametrize("number", [2, 4])
def test_lars_under_deepspeed_alone_knows_its_layers(world: Any, number: int) -> None:
    world(number)(parts_of_nothing)
    for stage in (1, 2):
        for ours, theirs in world(number)(alone, stage):
            torch.testing.assert_close(ours, theirs, **NEAR)


def parts_of_nothing(rank: int) -> None:
    """Set up DeepSpeed as a run does, which spares a compilation."""
    parts_of(sections("sgd", 1))


def test_one_process_holds_everything() -> None:
    runtime = Runtime(parallel=Parallel(strategy="deepspeed"))
    assert type(runtime.prepare(nn.Linear(2, 2), lambda model: torch.optim.SGD(model.parameters()))) is Replicas


@pytest.mark.parametrize("package", ["deepspeed", "transformers"])
def test_a_package_that_is_missing_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None if name == package else find_spec(name))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=rf"{package} is not installed; pip install 'bigbatch\[deepspeed\]'"):
        Runtime(parallel=Parallel(strategy="deepspeed"))
