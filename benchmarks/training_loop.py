"""Steps per second of bigbatch beside a loop by hand, Accelerate and Lightning: the figures in benchmarks/README.md.

    pip install 'bigbatch[bench,dev]'
    OMP_NUM_THREADS=1 python benchmarks/training_loop.py [cnn mlp] [--only NAME ...]

All train the same model from the same weights on the same data in the same batches' sizes, on two gloo processes of one
thread: DistributedDataParallel with the same options, fused SGD with momentum, a cosine rate set at every step, the
gradient clipped by its global norm. bigbatch runs its own `train` with its defaults, so it also writes loss, rate and
gradient norm of every step to metrics.jsonl, skips steps that are not finite and compares its processes once an epoch;
its images are normalised when they are fetched. The others index tensors that are ready, and report nothing unless
their name says so. All are started at once and take turns, a block of steps each, so that other work on the machine
meets them alike; what is compared with a block of the loop by hand is the block of the same turn.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bigbatch.config import Duration, RunConfig
from bigbatch.data import load_data, size_of
from bigbatch.dist import Runtime, run_processes
from bigbatch.plan import resolve
from bigbatch.signals import StopSignal
from bigbatch.tasks import build_task
from bigbatch.train import assemble, train

WORLD, LR, MOMENTUM, CLIP = 2, 0.01, 0.9, 1.0
forkserver = multiprocessing.get_context("forkserver")
DDP = {"broadcast_buffers": False, "gradient_as_bucket_view": True}


@dataclass(frozen=True)
class Problem:
    """``recipe`` is what the problems differ in; a turn takes ``block`` steps."""

    title: str
    batch: int
    turns: int
    block: int
    recipe: Mapping[str, Any]

    def config(self, out: str) -> RunConfig:
        common = {
            "run": {"dir": out, "stop_after": f"{self.total}st"},
            "duration": f"{2 * self.total}st",  # the evaluation at a run's end is not reached
            "batch": {"global": self.batch},
            "optim": {"name": "sgd", "lr": LR, "momentum": MOMENTUM, "groups": [{"match": "rest"}]},
            "decay": {"kind": "cosine"},
            "clip": {"kind": "norm", "max": CLIP},
            "eval": {"every": "100%"},
            "checkpoint": {"every": "100%"},
            "tracking": {"console": "none"},
        }
        return RunConfig.model_validate(common | dict(self.recipe))

    @property
    def total(self) -> int:
        return self.turns * self.block

    def rate(self, step: int) -> float:
        return LR * 0.5 * (1 + math.cos(math.pi * step / (2 * self.total)))


PROBLEMS = {
    "cnn": Problem(
        "a residual CNN of 78,000 parameters, Fashion-MNIST, batch 256",
        batch=256,
        turns=20,
        block=5,
        recipe={
            "task": {"name": "classification", "model": "bigbatch/resnet_small"},
            "data": {"name": "idx", "path": ["data/fashion_mnist", "/usr/share/datasets/fashion-mnist"]},
        },
    ),
    "mlp": Problem(
        "an MLP of 64-64-64-10, digits, batch 64",
        batch=64,
        turns=60,
        block=34,  # two epochs
        recipe={"task": {"name": "classification", "model": "timm/tiny_mlp"}, "data": {"name": "digits"}},
    ),
}


def tiny_mlp(*, in_chans: int, num_classes: int, **_: object) -> nn.Module:
    layers = (nn.Flatten(), nn.Linear(in_chans * 64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(64, num_classes))


# ------------------------------------------------------------------------------------------------- what all share


class Pace:
    """Seconds of each block of steps; between two of them all other contenders take theirs."""

    def __init__(self, block: int, *, own: Semaphore, next: Semaphore) -> None:
        self.blocks: list[float] = []
        self._block, self._own, self._next, self._steps, self._start = block, own, next, 0, 0.0

    def note(self) -> None:
        """A batch is asked for."""
        if self._steps % self._block == 0:
            if self._steps:
                dist.barrier()
                self.blocks.append(time.perf_counter() - self._start)
                self.pass_on()
            self._own.acquire()
            dist.barrier()
            self._start = time.perf_counter()
        self._steps += 1

    def pass_on(self) -> None:
        self._next.release()


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


def prepare(problem: Problem, rank: int, pace: Pace) -> tuple[nn.Module, torch.optim.Optimizer, Batches]:
    """The parts of a loop that is not bigbatch's."""
    config = problem.config("unused")
    data = load_data(config.data, seed=0)
    images, labels = data.train.gather(torch.arange(len(data.train)))
    mean, std = (value.float()[:, None, None] for value in (data.mean, data.std))
    torch.manual_seed(0)
    model = build_task(config.task, shape=data.shape, classes=data.classes).build_model()
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, fused=True)
    size = problem.batch // WORLD
    return model, optimizer, Batches((images / 255 - mean) / std, labels, size=size, rank=rank, pace=pace)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


# ------------------------------------------------------------------------------------------------ the contenders


def by_hand(problem: Problem, rank: int, out: str, pace: Pace, *, report: bool = False) -> None:
    model, optimizer, batches = prepare(problem, rank, pace)
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


def by_hand_reporting(problem: Problem, rank: int, out: str, pace: Pace) -> None:
    by_hand(problem, rank, out, pace, report=True)


def accelerate(problem: Problem, rank: int, out: str, pace: Pace) -> None:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    model, optimizer, batches = prepare(problem, rank, pace)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**DDP)])
    model, optimizer = accelerator.prepare(model, optimizer)
    for step, (image, label) in zip(range(problem.total), batches.endless(), strict=False):
        set_rate(optimizer, problem.rate(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(image), label)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


def lightning(problem: Problem, rank: int, out: str, pace: Pace, *, report: bool = False) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import DDPStrategy

    model, optimizer, batches = prepare(problem, rank, pace)

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


def lightning_reporting(problem: Problem, rank: int, out: str, pace: Pace) -> None:
    lightning(problem, rank, out, pace, report=True)


def bigbatch(problem: Problem, rank: int, out: str, pace: Pace, *, every: str = "1st") -> None:
    config = problem.config(out)
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"every": Duration.parse(every)})})
    plan = resolve(config, world_size=WORLD, dataset_size=size_of(config.data))
    with Runtime() as runtime:
        parts = assemble(config, plan, runtime)
        fetch = parts.loader.train

        def noted(positions: range, *, window: range | None = None) -> dict[str, Tensor]:
            pace.note()
            return fetch(positions, window=window)

        parts.loader.train = noted  # type: ignore[method-assign]
        train(parts, StopSignal(grace=60))


def bigbatch_quiet(problem: Problem, rank: int, out: str, pace: Pace) -> None:
    bigbatch(problem, rank, out, pace, every="100%")


CONTENDERS: dict[str, Callable[[Problem, int, str, Pace], None]] = {
    "by hand": by_hand,
    "by hand, reporting": by_hand_reporting,
    "bigbatch": bigbatch,
    "bigbatch, no reports": bigbatch_quiet,
    "Accelerate": accelerate,
    "Lightning": lightning,
    "Lightning, CSV log": lightning_reporting,
}


def measure(rank: int, name: str, problem: Problem, out: str, turns: Mapping[str, list[Semaphore]]) -> list[float]:
    """Seconds of each block of one contender, in one of its processes."""
    import timm  # slow to import

    warnings.simplefilter("ignore")
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
    timm.models.register_model(tiny_mlp)
    names = list(turns)
    after = names[(names.index(name) + 1) % len(names)]
    pace = Pace(problem.block, own=turns[name][rank], next=turns[after][rank])
    CONTENDERS[name](problem, rank, out, pace)
    pace.pass_on()
    # In the first block the others start, and in the last they end; a loop that fetches ahead sees that one whole.
    return pace.blocks[1 : problem.turns - 1]


def compare(problem: Problem, names: list[str]) -> Table:
    turns = {name: [forkserver.Semaphore(0) for _ in range(WORLD)] for name in names}
    for first in turns[names[0]]:
        first.release()
    with ThreadPoolExecutor(len(names)) as pool, tempfile.TemporaryDirectory() as out:
        for name in names:
            Path(out, name).mkdir()
        jobs = {name: (measure, name, problem, f"{out}/{name}", turns) for name in names}
        runs = {name: pool.submit(run_processes, WORLD, *job, timeout=300, limit=300) for name, job in jobs.items()}
        times = {name: run.result()[0] for name, run in runs.items()}
    table = Table("loop", "steps/s", "ms a step", "ms more", "speed", "quartiles", title=problem.title)
    for name, blocks in times.items():
        median, pairs = statistics.median(blocks) / problem.block, list(zip(blocks, times["by hand"], strict=True))
        more = statistics.median(ours - theirs for ours, theirs in pairs) / problem.block
        low, speed, high = statistics.quantiles([theirs / ours for ours, theirs in pairs], n=4)
        figures = f"{1 / median:.1f}", f"{1000 * median:.2f}", f"{1000 * more:+.2f}", f"{speed:.3f}"
        table.add_row(name, *figures, f"{low:.3f} to {high:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS), metavar="PROBLEM", help=" or ".join(PROBLEMS))
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), metavar="NAME", help="besides the loop by hand")
    args = parser.parse_args()
    names = list(dict.fromkeys(["by hand", *args.only]))
    for problem in args.problems:
        Console().print(compare(PROBLEMS[problem], names))


if __name__ == "__main__":
    main()
