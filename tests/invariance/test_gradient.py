"""The gradient contract: whatever the layout, a step is that of the whole window on one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bigbatch.config import RunConfig
from bigbatch.dist import Runtime
from bigbatch.keyed import uniform
from bigbatch.plan import resolve
from bigbatch.tasks import ClassificationTask
from bigbatch.train import Parts, assemble, train_step
from ranks import Ranks

MOST = {"norm": 0.05, "none": None}


class Weighted(ClassificationTask):
    """Every sample weighs what a hash of it says; a third of them nothing, as masked tokens and padding do."""

    weight_is_count = False

    def weights(self, batch: dict[str, Tensor]) -> Tensor:
        return (uniform(5, batch["index"], draw=0) * 3 - 1).clamp(min=0)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        each = F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")
        return (each * self.weights(batch)).sum(), self.weight(batch)

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        return self.weights(batch).sum()


@dataclasses.dataclass(frozen=True)
class Case:
    micro: int
    accumulation: int
    span: int | None
    """Of batch norm; None is group norm."""
    weighted: bool
    clip: str
    start: int
    """Samples seen before the window."""
    size: int
    """Of the window, at most the global batch."""
    seed: int

    def parts(self, world: int) -> Parts:
        norm = {"kind": "batch", "span": self.span} if self.span else {"kind": "group", "groups": 2}
        config = RunConfig.model_validate(
            {
                "seed": self.seed,
                "duration": "3ep",
                "batch": {"global": world * self.micro * self.accumulation, "micro": self.micro},
                "optim": {"name": "sgd", "lr": 0.1},
                "warmup": {"kind": "gradual", "duration": "50%", "start": "zero"},
                "clip": {"kind": self.clip, "max": MOST[self.clip]},
                "norm": norm,
                "task": {"name": "classification", "model": "bigbatch/resnet_small", "options": {"widths": [4, 6]}},
                "data": {"name": "digits", "augment": {"shift": 1, "mixup": 0.0 if self.weighted else 0.4}},
                "precision": "fp64",
            }
        )  # fmt: skip
        plan = resolve(config, world_size=world, dataset_size=1085)
        plan = dataclasses.replace(plan, samples=self.start + self.size)
        parts = assemble(config, plan, Runtime(precision="fp64"))
        if self.weighted:
            parts = dataclasses.replace(parts, task=Weighted(config.task, parts.loader.dataset.spec))
        return parts


@st.composite
def cases(draw: st.DrawFn, world: int) -> Case:
    micro, accumulation = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    inside = [span for span in range(2, micro + 1) if micro % span == 0]
    across = [micro * q for q in range(2, world + 1) if world % q == 0]
    span = draw(st.sampled_from([None, *inside, *across]))
    batch = world * micro * accumulation
    return Case(
        micro=micro,
        accumulation=accumulation,
        span=span,
        weighted=draw(st.booleans()),
        clip=draw(st.sampled_from(["none", "norm"])),
        start=draw(st.integers(0, 1200)),
        size=draw(st.integers(1, batch)),
        seed=draw(st.integers(0, 99)),
    )


@dataclasses.dataclass(frozen=True)
class Result:
    loss: float
    lr: float
    norm: float
    """Before clipping."""
    gradients: Tensor
    """After clipping."""
    running: Tensor


def step(rank: int, case: Case) -> Result:
    """One step in a layout."""
    parts = case.parts(torch.distributed.get_world_size())
    report = train_step(parts, samples=case.start)
    parts.stats.merge(parts.runtime.sum, rank)
    assert report.loss is not None and report.global_batch == case.size
    gradients = [p.grad.flatten() for p in parts.model.parameters() if p.grad is not None]
    running = [buffer for name, buffer in parts.model.named_buffers() if "running" in name]
    return Result(report.loss, report.lr, report.grad_norm, torch.cat(gradients), torch.cat([torch.zeros(0), *running]))


def textbook(case: Case, world: int) -> Result:
    """One process, torch's own norms, the window group by group: Σ loss over Σ weight, by autograd."""
    whole = case.micro * world
    parts = dataclasses.replace(case, micro=whole, span=case.span and whole).parts(1)
    model = parts.model
    if case.span:
        torch.manual_seed(case.seed)
        model = parts.task.build_model().double()
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0  # so that a running statistic is that of the last group
    window, span = range(case.start, case.start + case.size), case.span or case.size
    cuts = [*range(0, max(case.size - span, 0) + 1, span), case.size]
    losses, running = [], [torch.zeros(layer.num_features, dtype=torch.float64) for layer in layers for _ in range(2)]
    for low, high in pairwise(cuts):
        losses.append(parts.task.loss(model, parts.loader.train(window[low:high], window=window)))
        for mean, statistic in zip(running, statistics(layers), strict=True):
            mean += (high - low) / case.size * statistic
    weight = torch.stack([weight for _, weight in losses]).sum()
    assume(weight > 0)
    loss = torch.stack([loss for loss, _ in losses]).sum() / weight
    gradients = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    norm, most = gradients.norm().item(), MOST[case.clip]
    if most:
        gradients = gradients * min(1.0, most / (norm + 1e-6))
    start = [torch.full_like(running[i], i % 2) for i in range(len(running))]
    moved = [0.9 * old + 0.1 * new for old, new in zip(start, running, strict=True)]
    return Result(loss.item(), parts.plan.lr(case.start), norm, gradients, torch.cat([torch.zeros(0), *moved]))


def statistics(layers: list[nn.BatchNorm2d]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in (layer.running_mean, layer.running_var) if tensor is not None]


@pytest.fixture(scope="module")
def pool() -> Iterator[Callable[[int], Ranks]]:
    started: dict[int, Ranks] = {}
    yield lambda world: started.setdefault(world, Ranks(world)) if world not in started else started[world]
    for ranks in started.values():
        ranks.close()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@settings(max_examples=25, derandomize=True)
@given(data=st.data())
def test_a_step_is_that_of_the_whole_window_on_one_process(
    pool: Callable[[int], Ranks], world: int, data: st.DataObject
) -> None:
    case = data.draw(cases(world))
    wanted = textbook(case, world)
    for found in pool(world)(step, case):
        assert found.lr == wanted.lr
        assert found.loss == pytest.approx(wanted.loss, rel=1e-11)
        assert found.norm == pytest.approx(wanted.norm, rel=1e-9)
        assert (found.gradients - wanted.gradients).norm() <= 1e-9 * wanted.gradients.norm()
        torch.testing.assert_close(found.running, wanted.running, rtol=1e-10, atol=1e-12)
