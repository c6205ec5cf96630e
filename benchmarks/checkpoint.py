"""What a save each 100 steps costs, written in the background and in the foreground: figures in benchmarks/README.md.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [cnn wide] [--steps 100] [--rounds 7] [--out DIR]

A residual CNN on synthetic images of 1 × 28 × 28 and SGD with momentum, on gloo processes of one thread, one for each
of two cores, so that what the writing thread computes is taken from training. In each round the three ways take turns:
a save (or none), then the steps. Times are those of whole blocks; saving costs what a block takes longer than the one
without a save in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from bigbatch.config import RunConfig
from bigbatch.data import size_of
from bigbatch.dist import Runtime, run_processes
from bigbatch.plan import resolve
from bigbatch.train import Parts, assemble, train_step
from bigbatch.train.checkpoint import Checkpoints

PROBLEMS = {"cnn": [16, 32, 64], "wide": [64, 128, 256]}
WAYS: tuple[Literal["none", "background", "foreground"], ...] = ("none", "background", "foreground")


def parts_of(widths: list[int], world_size: int) -> Parts:
    recipe: dict[str, Any] = {
        "duration": "1000000st",
        "batch": {"global": 128},
        "optim": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
        "task": {"name": "classification", "model": "bigbatch/resnet_small", "options": {"widths": widths}},
        "data": {"name": "synthetic", "size": 4096, "shape": [1, 28, 28]},
    }
    config = RunConfig.model_validate(recipe)
    plan = resolve(config, world_size=world_size, dataset_size=size_of(config.data))
    return assemble(config, plan, Runtime(precision=config.precision, parallel=config.parallel))


def blocks(rank: int, widths: list[int], steps: int, rounds: int, out: str) -> dict[str, Any]:
    """Seconds of each way's blocks; of the saves, the seconds of stall and of writing; bytes of a checkpoint."""
    torch.set_num_threads(1)
    parts = parts_of(widths, dist.get_world_size())
    state = {"samples": 0, "metrics": None, "recipe": parts.config.model_dump(mode="json", by_alias=True)}
    saves = {
        way: Checkpoints(Path(out, way), keep=2, best="accuracy", best_is="max", write=way)
        for way in WAYS
        if way != "none"
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    samples = 0
    for turn in range(-1, rounds):  # the first warms up
        for way in WAYS[turn % 3 :] + WAYS[: turn % 3]:
            dist.barrier()
            start = time.perf_counter()
            if way != "none":
                model, optimizer = parts.strategy.model_state(), parts.strategy.optimizer_state()
                if rank == 0:
                    saves[way].save(turn + 1, model=model, optimizer=optimizer, state=state, since=start)
            for _ in range(steps):
                train_step(parts, samples=samples)
                samples += parts.plan.global_batch
            dist.barrier()
            if turn >= 0:
                seconds[way].append(time.perf_counter() - start)
            if way != "none" and rank == 0 and (error := saves[way].wait()):
                raise error
    found: dict[str, Any] = {"seconds": seconds}
    if rank == 0:
        found["saves"] = {way: list(each.events)[1:] for way, each in saves.items()}
        newest = saves["foreground"].paths()[-1]
        found["bytes"] = sum(file.stat().st_size for file in newest.iterdir())
    return found


def costs_of(found: dict[str, Any], way: str) -> list[float]:
    """Quartiles of what saving adds to a block's time, of the time without."""
    pairs = zip(found["seconds"]["none"], found["seconds"][way], strict=True)
    return statistics.quantiles([with_saves / without - 1 for without, with_saves in pairs], n=4)


def shares(found: dict[str, Any]) -> str:
    """The two parts of a save in the background, which other work on the machine blurs less than whole blocks."""
    block, saves = statistics.median(found["seconds"]["none"]), found["saves"]["background"]
    stall, write = (statistics.median(save[f"{part}_seconds"] for save in saves) / block for part in ("stall", "write"))
    return f"training waited for {stall:.2%}, the thread wrote for {write:.2%}"


def table_of(name: str, found: dict[str, Any], steps: int) -> Table:
    """Medians and quartiles over the rounds."""
    title = f"{name}: {found['bytes'] / 1e6:.1f} MB each {steps} steps"
    table = Table("write", "block s", "stall ms", "writing ms", "saving costs", "quartiles", title=title)
    for way, seconds in found["seconds"].items():
        low, middle, high = costs_of(found, way)
        events = found["saves"].get(way, [])
        stall, write = (
            f"{1000 * statistics.median(event[key] for event in events):.1f}" if events else ""
            for key in ("stall_seconds", "write_seconds")
        )
        costs = (f"{middle:.2%}", f"{low:.2%} to {high:.2%}") if events else ("", "")
        table.add_row(way, f"{statistics.median(seconds):.2f}", stall, write, *costs)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS), metavar="PROBLEM", help=" or ".join(PROBLEMS))
    parser.add_argument("--steps", type=int, default=100, help="steps between two saves (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="blocks of each way (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="gloo processes (%(default)s)")
    parser.add_argument("--out", type=Path, help="where to save, a disk of the kind you use; default: a temporary one")
    args = parser.parse_args()
    for name in args.problems:
        with tempfile.TemporaryDirectory(dir=args.out) as out:
            job = (PROBLEMS[name], args.steps, args.rounds, out)
            found, *_ = run_processes(args.processes, blocks, *job, timeout=600)
        Console().print(table_of(name, found, args.steps))
        print(f"{name}: saving costs {costs_of(found, 'background')[1]:.2%} of training time; {shares(found)}")


if __name__ == "__main__":
    main()
