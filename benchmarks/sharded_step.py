"""What a step sends and what a process holds, for each strategy and number of processes.

    python benchmarks/sharded_step.py [--optim lars] [--accumulation 2]

One step of a small residual network on digits, on real gloo processes on the CPU. Collectives are counted by
torch.profiler as they are asked for; bytes are those of the tensors that rank 0 hands over or receives, whichever are
more, not what an algorithm of the library puts on the wire.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bigbatch.config import RunConfig, merge
from bigbatch.dist import Runtime, part, run_processes
from bigbatch.plan import resolve
from bigbatch.train import assemble, train_step

RECIPE: dict[str, Any] = {
    "duration": "1ep",
    "batch": {"global": 64},
    "clip": {"kind": "norm", "max": 1.0},
    "norm": {"kind": "batch", "span": 4},
    "task": {"name": "classification", "model": "bigbatch/resnet_small", "options": {"blocks": 2}},
    "data": {"name": "digits"},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "adamw": {"lr": 0.001},
    "lars": {"lr": 1.0, "trust_coefficient": 0.02},
    "lamb": {"lr": 0.01},
}
STRATEGIES: tuple[dict[str, Any], ...] = (
    {"strategy": "ddp"},
    {"strategy": "ddp", "compression": "bf16"},
    {"strategy": "zero1"},
    {"strategy": "fsdp2"},
    {"strategy": "fsdp2", "compression": "bf16"},
    {"strategy": "deepspeed", "zero_stage": 1},
    {"strategy": "deepspeed", "zero_stage": 2},
)
SIZES = {"c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8, "long int": 8}


def measure(rank: int, recipe: dict[str, Any], accumulation: int) -> tuple[Counter[str], Counter[str], int, int]:
    """Calls and bytes of one step by collective, and the bytes of parameters and of optimiser state held here."""
    world = torch.distributed.get_world_size()
    micro = recipe["batch"]["global"] // (world * accumulation)
    config = RunConfig.model_validate(merge(recipe, {"batch": {"micro": micro}}))
    plan = resolve(config, world_size=world, dataset_size=1085)
    parts = assemble(config, plan, Runtime(precision=config.precision, parallel=config.parallel))
    # DistributedDataParallel settles on its buckets in the first step.
    for step in range(2):
        train_step(parts, samples=step * config.batch.global_)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        train_step(parts, samples=2 * config.batch.global_)
    calls, sent, name = Counter[str](), Counter[tuple[str, int]](), ""
    for event in profiler.profiler.kineto_results.events():
        if event.name().startswith("c10d::"):
            name = event.name().removeprefix("c10d::").strip("_").replace("_base", "")
            calls[name] += 1
        # What a list holds is seen only inside.
        elif not event.name().startswith("gloo:") or sent[name, calls[name]]:
            continue
        sent[name, calls[name]] = max(map(_bytes, event.shapes(), event.dtypes()))
    bytes_ = Counter[str]()
    for (name, _), number in sent.items():
        bytes_[name] += number
    state = [t for state in parts.strategy.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return calls, bytes_, _held(parts.model.parameters()), _held(state)


def _bytes(shape: list[int], dtype: str) -> int:
    return math.prod(shape) * SIZES[dtype] if dtype in SIZES else 0


def _held(tensors: Any) -> int:
    return sum(part(tensor).nbytes for tensor in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optim", choices=OPTIMIZERS, default="lars")
    parser.add_argument("--accumulation", type=int, default=2)
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler greets on standard error
    recipe = RECIPE | {"optim": {"name": args.optim, **OPTIMIZERS[args.optim]}}
    print(f"{args.optim}, {args.accumulation} micro batches a step, torch {torch.__version__}, gloo")
    print(f"{'strategy':<15}{'processes':>9}{'parameters':>12}{'state, most':>12}  collectives a step (calls, bytes)")
    for world in (1, 2, 4):
        for parallel in STRATEGIES:
            job = (recipe | {"parallel": parallel}, args.accumulation)
            ranks = run_processes(world, measure, *job, timeout=120, limit=120)
            calls, sent, parameters, _ = ranks[0]
            state = max(held for *_, held in ranks)
            told = ", ".join(f"{name} {calls[name]} ({sent[name]:,})" for name in sorted(calls)) or "none"
            title = " ".join(str(value) for value in parallel.values()).replace("deepspeed", "ZeRO")
            print(f"{title:<15}{world:>9}{parameters:>12,}{state:>12,}  {told}", flush=True)


if __name__ == "__main__":
    main()
