"""DistributedDataParallel's exchange: what it carries, what a run that goes on finds, what compression sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bigbatch.cli import main
from bigbatch.config import RunConfig, merge
from bigbatch.dist import Runtime
from bigbatch.plan import resolve
from bigbatch.train import Parts, assemble, train_step
from bigbatch.train.checkpoint import open_newest
from ranks import Ranks, run_ranks
from train.assembled import BASE

WEIGHTED = {"task": {"class_weights": [1, 2, 1, 1, 1, 0.5, 1, 1, 3, 1]}}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def parts_of(world: int, **sections: Any) -> Parts:
    config = RunConfig.model_validate(merge(BASE, {"batch": {"micro": 24}, "precision": "fp32", **sections}))
    plan = resolve(config, world_size=world, dataset_size=1085)
    return assemble(config, plan, Runtime(precision=config.precision, parallel=config.parallel))


def steps(parts: Parts, count: int) -> list[float | None]:
    return [train_step(parts, samples=96 * i).loss for i in range(count)]


def weights(parts: Parts) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parts.model.parameters()])


# --------------------------------------------------------------------------------- losses and weights on the way


def carried(rank: int, sections: dict[str, Any]) -> tuple[list[float | None], list[str]]:
    """The losses of three steps, and the names of the collectives of those after the first, which rebuilds buckets."""
    parts = parts_of(2, **sections)
    losses = steps(parts, 1)
    with torch.profiler.profile() as profile:
        losses += [train_step(parts, samples=96 * i).loss for i in (1, 2)]
    return losses, [event.name for event in profile.events() if event.name.startswith("gloo:")]


@pytest.mark.parametrize("sections", [{}, WEIGHTED], ids=["counts", "weights"])
def test_loss_and_weight_travel_with_the_gradient(two: Ranks, sections: dict[str, Any]) -> None:
    alone = steps(parts_of(1, **sections), 3)
    for losses, collectives in two(carried, sections):
        assert losses == pytest.approx(alone, rel=1e-5)
        assert collectives == ["gloo:all_reduce"] * 2


# ------------------------------------------------------------------------------------------------ pinned buckets


def go(rank: int, recipe: str, run: str, *more: str) -> int:
    return main(["train", recipe, f"run.dir={run}", *more])


def test_a_run_that_goes_on_sums_like_one_that_never_stopped(tmp_path: Path) -> None:
    """On three processes, bit for bit: gloo's sums follow where a gradient lies in its bucket."""
    recipe, whole, halves = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "halves"
    quiet = {"tracking": {"console": "none"}, "precision": "fp32", "duration": "8st"}
    recipe.write_text(json.dumps(merge(BASE, quiet)))
    run_ranks(3, go, str(recipe), str(whole))
    run_ranks(3, go, str(recipe), str(halves), "run.stop_after=4st")
    run_ranks(3, go, str(recipe), str(halves))
    ours, theirs = (open_newest(run / "checkpoints").model() for run in (halves, whole))
    # Running statistics are summed over processes whenever they are read, and so once more in the second run.
    assert [name for name in theirs if "running" not in name and not torch.equal(ours[name], theirs[name])] == []


# --------------------------------------------------------------------------------------------------- compression


def compressed(rank: int, sections: dict[str, Any]) -> tuple[list[float | None], Tensor, int]:
    """Losses, final weights, and the bytes that one of the last steps gave to be summed."""
    parts, payload = parts_of(2, **sections), []
    losses = steps(parts, 5)
    whole = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        payload.append(tensor.nbytes)
        return whole(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        losses += [train_step(parts, samples=96 * 5).loss]
    finally:
        dist.all_reduce = whole
    return losses[:5], weights(parts), sum(payload)


@pytest.mark.parametrize(
    ("compression", "away"),
    [({"compression": "bf16"}, 0.1), ({"compression": "fp16"}, 0.03), ({"compression": "powersgd"}, 0.5)],
)
def test_compressed_gradients(two: Ranks, compression: dict[str, Any], away: float) -> None:
    (_, exact, _), _ = two(compressed, {})
    start = torch.cat([p.detach().flatten() for p in parts_of(1).model.parameters()])
    (losses, ours, payload), (_, theirs, _) = two(compressed, {"parallel": compression})
    assert torch.equal(ours, theirs)
    moved = float((ours - exact).norm() / (exact - start).norm())
    assert 0 < moved < away
    assert losses == pytest.approx(steps(parts_of(1), 5), rel=0.05)
    whole = 4 * ours.numel()
    assert payload < (0.6 if compression["compression"] == "powersgd" else 0.502) * whole


def spoilt(rank: int) -> list[bool]:
    """Which of seven steps were skipped, where rank 1 sees infinite images in the fourth."""
    parts = parts_of(2, parallel={"compression": "powersgd"})
    train, skipped = parts.loader.train, []
    for i in range(7):
        if i == 3 and rank == 1:
            parts.loader.train = lambda *args, **kwargs: {
                name: tensor * float("inf") if name == "image" else tensor
                for name, tensor in train(*args, **kwargs).items()
            }
        skipped.append(train_step(parts, samples=96 * i).skipped)
        parts.loader.train = train
    return skipped


def test_powersgd_forgets_what_is_not_finite(two: Ranks) -> None:
    assert two(spoilt) == [[False] * 3 + [True] + [False] * 3] * 2


def scaled(rank: int, strategy: str) -> float:
    """The gradient norm of a step after the exchange, before its loss scale is divided out."""
    parts, seen = parts_of(2, parallel={"strategy": strategy}, precision="fp16"), []
    held = parts.strategy.held

    def look() -> Any:
        seen.append(sum(float(g.double().square().sum()) for _, g in held()))
        return held()

    parts.strategy.held = look
    train_step(parts, samples=0)
    square = torch.tensor(seen[0])
    if parts.strategy.sum_parts:
        parts.strategy.sum_parts(square)
    return float(square.sqrt())


def test_gradients_are_as_large_on_their_way_under_every_strategy(two: Ranks) -> None:
    """DistributedDataParallel's sum is divided by the processes; a pure one would start from a smaller loss."""
    (ddp, _), (fsdp2, _) = two(scaled, "ddp"), two(scaled, "fsdp2")
    assert fsdp2 == pytest.approx(2 * ddp, rel=0.02)


def probed(rank: int, compression: str) -> tuple[float, float, Tensor]:
    """This process's gradient norm as a probe and as autograd has it, and the weights after the step."""
    parts, squares = parts_of(2), []
    parts.strategy._parallel = parts.config.parallel.model_copy(update={"compression": compression})
    parts.strategy.start([lambda bucket: squares.append(float(bucket.buffer().square().sum()))])
    train_step(parts, samples=0)
    alone = parts_of(2)
    with alone.strategy.exchange(when=False):
        for first in (0, 48):
            batch = alone.loader.train(range(first + 24 * rank, first + 24 * rank + 24), window=range(96))
            loss, _ = alone.task.loss(alone.strategy.wrapped, batch)
            (loss * 2 / 96).backward()
    norm = float(torch.cat([p.grad.flatten() for p in alone.model.parameters() if p.grad is not None]).norm())
    return sum(squares) ** 0.5, norm, weights(parts)


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_probes_see_each_process_s_own_gradient(two: Ranks, compression: str) -> None:
    rows = two(probed, compression)
    assert all(seen == pytest.approx(norm, rel=1e-5) for seen, norm, _ in rows)
    assert rows[0][0] != rows[1][0] and torch.equal(rows[0][2], rows[1][2])
