"""Steps per second of bigbatch beside a loop by hand, Accelerate and Lightning: the figures in benchmarks/README.md.

    pip install lightning
    OMP_NUM_THREADS=1 python benchmarks/training_loop.py [cnn mlp] [--rounds 7] [--only NAME ...]

All train the same model from the same weights on the same data in the same batches' sizes, on two gloo processes of one
thread: DistributedDataParallel with the same options, fused SGD with momentum, a cosine rate set at every step, the
gradient clipped by its global norm. bigbatch runs its own `train` with its defaults, so it also writes loss, rate and
gradient norm of every step to metrics.jsonl, skips steps that are not finite and compares its processes once an epoch;
its images are normalised when they are fetched. The others index tensors that are ready, and report nothing unless
their name says so. A step is what lies between two fetches of a batch. Every round starts each of them afresh, in
rotating order, and compares it with the loop by hand of the same round.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bigbatch.config import RunConfig
from bigbatch.data import load_data, size_of
from bigbatch.dist import Runtime, run_processes
from bigbatch.plan import resolve
from bigbatch.tasks import build_task
from bigbatch.train import assemble, train

WORLD, WARMUP, LR, MOMENTUM, CLIP = 2, 20, 0.01, 0.9, 1.0
DDP = {"broadcast_buffers": False, "gradient_as_bucket_view": True}


@dataclass(frozen=True)
class Problem:
    """``recipe`` is what the problem's differ in; the loops take ``steps`` after `WARMUP`."""

    title: str
    batch: int
    steps: int
    block: int
    recipe: Mapping[str, Any]

    def config(self, out: str) -> RunConfig:
        common = {
            "run": {"dir": out, "stop_after": f"{self.total}st"},
            "duration": f"{2 * self.total}st",  # the evaluation at a run's end is not reached
            "batch": {"global": self.batch},
            "optim": {"name": "sgd", "lr": LR, "momentum": MOMENTUM},
            "decay": {"kind": "cosine"},
            "clip": {"kind": "norm", "max": CLIP},
            "eval": {"every": "100%"},
            "checkpoint": {"every": "100%"},
            "tracking": {"console": "none"},
        }
        return RunConfig.model_validate(common | dict(self.recipe))

    @property
    def total(self) -> int:
        return WARMUP + self.steps

    def rate(self, step: int) -> float:
        return LR * 0.5 * (1 + math.cos(math.pi * step / (2 * self.total)))


PROBLEMS = {
    "cnn": Problem(
        "a residual CNN of 78,000 parameters, Fashion-MNIST, batch 256",
        batch=256,
        steps=61,
        block=10,
        recipe={
            "task": {"name": "classification", "model": "bigbatch/resnet_small"},
            "data": {"name": "idx", "path": ["data/fashion_mnist", "/usr/share/datasets/fashion-mnist"]},
        },
    ),
    "mlp": Problem(
        "an MLP of 64-64-64-10, digits, batch 64",
        batch=64,
        steps=601,
        block=50,
        recipe={"task": {"name": "classification", "model": "timm/tiny_mlp"}, "data": {"name": "digits"}},
    ),
}


def tiny_mlp(*, in_chans: int, num_classes: int, **_: object) -> nn.Module:
    layers = (nn.Flatten(), nn.Linear(in_chans * 64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(64, num_classes))


# ------------------------------------------------------------------------------------------------- what all share


@dataclass
class Pace:
    """When each batch was asked for."""

    times: list[float] = field(default_factory=list)

    def note(self) -> None:
        self.times.append(time.perf_counter())

    def seconds(self, problem: Problem) -> float:
        """Seconds a step: the median over blocks of steps after the warmup, as other work comes to this machine too."""
        marks = self.times[WARMUP : problem.total : problem.block]
        return statistics.median(after - before for before, after in pairwise(marks)) / problem.block


class Batches(Iterable[tuple[Tensor, Tensor]]):
    """One epoch of this process's batches each time it is iterated, in a new order; all of ``size`` samples."""

    def __init__(self, images: Tensor, labels: Tensor, *, size: int, rank: int, pace: Pace) -> None:
        self._images, self._labels, self._size, self._rank, self._pace = images, labels, size, rank, pace
        self._generator = torch.Generator().manual_seed(0)  # the same order on all processes

    def __len__(self) -> int:
        return len(self._labels) // (self._size * WORLD)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._labels), generator=self._generator)
        for mine in order.split(self._size)[self._rank : len(self) * WORLD : WORLD]:
            self._pace.note()
            yield self._images[mine], self._labels[mine]

    def endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self


def prepare(problem: Problem, rank: int, out: str) -> tuple[nn.Module, torch.optim.Optimizer, Batches, Pace]:
    """The parts of a loop that is not bigbatch's."""
    config, pace = problem.config(out), Pace()
    data = load_data(config.data, seed=0)
    images, labels = data.train.gather(torch.arange(len(data.train)))
    mean, std = (value.float()[:, None, None] for value in (data.mean, data.std))
    torch.manual_seed(0)
    model = build_task(config.task, shape=data.shape, classes=data.classes).build_model()
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, fused=True)
    size = problem.batch // WORLD
    return model, optimizer, Batches((images / 255 - mean) / std, labels, size=size, rank=rank, pace=pace), pace


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


# ------------------------------------------------------------------------------------------------ the contenders


def by_hand(problem: Problem, rank: int, out: str, *, report: bool = False) -> Pace:
    model, optimizer, batches, pace = prepare(problem, rank, out)
    ddp = DistributedDataParallel(model, **DDP)
    with Path(out, f"metrics_{rank}.jsonl").open("w") as file:
        for step, (image, label) in zip(range(problem.total), batches.endless(), strict=False):
            rate = problem.rate(step)
            set_rate(optimizer, rate)
            optimizer.zero_grad()
            loss = F.cross_entropy(ddp(image), label)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            if report:
                mean = loss.detach()
                dist.all_reduce(mean)
                event = {"step": step, "loss": float(mean) / WORLD, "lr": rate, "grad_norm": float(norm)}
                if rank == 0:
                    file.write(json.dumps(event) + "\n")
                    file.flush()
    return pace


def by_hand_reporting(problem: Problem, rank: int, out: str) -> Pace:
    return by_hand(problem, rank, out, report=True)


def accelerate(problem: Problem, rank: int, out: str) -> Pace:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    model, optimizer, batches, pace = prepare(problem, rank, out)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**DDP)])
    model, optimizer = accelerator.prepare(model, optimizer)
    for step, (image, label) in zip(range(problem.total), batches.endless(), strict=False):
        set_rate(optimizer, problem.rate(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(image), label)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return pace


def lightning(problem: Problem, rank: int, out: str, *, report: bool = False) -> Pace:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import DDPStrategy

    model, optimizer, batches, pace = prepare(problem, rank, out)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            set_rate(optimizer, problem.rate(self.global_step))
            image, label = batch
            loss = F.cross_entropy(self.model(image), label)
            if report:
                self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=DDPStrategy(process_group_backend="gloo", **DDP),
        max_steps=problem.total,
        gradient_clip_val=CLIP,
        logger=CSVLogger(out) if report else False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), batches)
    return pace


def lightning_reporting(problem: Problem, rank: int, out: str) -> Pace:
    return lightning(problem, rank, out, report=True)


def bigbatch(problem: Problem, rank: int, out: str) -> Pace:
    config, pace = problem.config(out), Pace()
    plan = resolve(config, world_size=WORLD, dataset_size=size_of(config.data))
    with Runtime() as runtime:
        parts = assemble(config, plan, runtime)
        fetch = parts.loader.train

        def noted(positions: range, *, window: range | None = None) -> dict[str, Tensor]:
            pace.note()
            return fetch(positions, window=window)

        parts.loader.train = noted  # type: ignore[method-assign]
        train(parts)
    return pace


CONTENDERS: dict[str, Callable[[Problem, int, str], Pace]] = {
    "by hand": by_hand,
    "by hand, reporting": by_hand_reporting,
    "bigbatch": bigbatch,
    "Accelerate": accelerate,
    "Lightning": lightning,
    "Lightning, CSV log": lightning_reporting,
}


def measure(rank: int, contender: str, problem: str, out: str) -> float:
    """Seconds a step of one contender takes, in one of its processes."""
    import timm  # slow to import

    warnings.simplefilter("ignore")
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
    timm.models.register_model(tiny_mlp)
    return CONTENDERS[contender](PROBLEMS[problem], rank, out).seconds(PROBLEMS[problem])


def compare(problem: str, *, rounds: int, names: list[str]) -> Table:
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with tempfile.TemporaryDirectory() as out:
                times[name].append(max(run_processes(WORLD, measure, name, problem, out, timeout=300, limit=600)))
    table = Table("loop", "steps/s", "ms a step", "ms more", "speed", "quartiles", title=PROBLEMS[problem].title)
    for name, values in times.items():
        median, pairs = statistics.median(values), list(zip(values, times["by hand"], strict=True))
        more = statistics.median(ours - theirs for ours, theirs in pairs)
        low, speed, high = statistics.quantiles([theirs / ours for ours, theirs in pairs], n=4)
        figures = f"{1 / median:.1f}", f"{1000 * median:.2f}", f"{1000 * more:+.2f}", f"{speed:.3f}"
        table.add_row(name, *figures, f"{low:.3f} to {high:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS), metavar="PROBLEM", help=" or ".join(PROBLEMS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), metavar="NAME", help="besides the loop by hand")
    args = parser.parse_args()
    names = list(dict.fromkeys(["by hand", *args.only]))
    for problem in args.problems:
        Console().print(compare(problem, rounds=args.rounds, names=names))


if __name__ == "__main__":
    main()
