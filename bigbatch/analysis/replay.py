"""The first steps of a run in one layout, recorded so that another layout can be held against them."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bigbatch.config import ConfigError, RunConfig
from bigbatch.data import Batch, Loader
from bigbatch.dist import Runtime, part
from bigbatch.plan import Plan
from bigbatch.train import Clock, Parts, RunError, assemble, check_ranks, fingerprints, train_step, upcoming


@dataclass
class Trace:
    """What a layout did, step by step.

    ids: (sample, epoch) of the window's samples in the window's order, int64 (N, 2), whoever had them; inputs: a hash
    of all else that the model was given of each, int64 (N,). parameters, statistics: the relative difference from the
    reference, and in words where it is largest; 0 and no words where there are no such tensors. ranks: when and how the
    processes came apart.
    """

    ids: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    parameters: list[tuple[float, str]] = field(default_factory=list)
    statistics: list[tuple[float, str]] = field(default_factory=list)
    ranks: tuple[int, str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def has_statistics(self) -> bool:
        """Whether the model has running statistics."""
        return any(name for _, name in self.statistics)


JOLT = 8
"""Relative change of each initial weight, at random, in units of the last place."""

Role = Literal["reference", "layout", "jolted"]


def replay(rank: int, config: RunConfig, plan: Plan, folder: Path, role: Role) -> Trace:
    """Take the plan's steps as one of its processes; rank 0's trace is the layout's.

    The ``reference`` leaves its parameters after each step in ``folder``, and after the first step and the last its
    running statistics, which are collected unmerged in between. All roles compare themselves with what is there; the
    ``jolted`` starts from weights that are off by rounding. Raises ConfigError for what the data or the model finds
    wrong with the recipe.
    """
    try:
        runtime = Runtime(precision=config.precision, parallel=config.parallel)
        parts = assemble(config, plan, runtime)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if role == "jolted":
        for parameter in parts.model.parameters():
            mine = part(parameter)
            mine *= 1 + JOLT * torch.finfo(mine.dtype).eps * torch.randn_like(mine)
    recorder = _Recorder(parts.loader)
    parts = dataclasses.replace(parts, loader=recorder)
    trace, clock = Trace(notes=tuple(warning.message for warning in parts.warnings)), Clock()
    parts.loader.follow(upcoming(parts, 0))
    while clock.samples < plan.samples:
        report = train_step(parts, samples=clock.samples)
        clock.samples, clock.step = clock.samples + report.global_batch, clock.step + 1
        ids, inputs = recorder.window(runtime, report.global_batch)
        trace.ids.append(ids)
        trace.inputs.append(inputs)
        trace.lr.append(report.lr)
        trace.loss.append(report.loss)
        trace.grad_norm.append(report.grad_norm)
        trace.skipped.append(report.skipped)
        if not trace.ranks and (odd := _odd_rank(parts, clock, dict(parts.model.named_parameters()))):
            trace.ranks = clock.step, odd
        merged = clock.step == 1 or clock.samples >= plan.samples
        if merged:
            parts.stats.merge(runtime.sum, rank)
        state = parts.strategy.model_state()
        if rank == 0:
            weights = {name: state[name] for name, _ in parts.model.named_parameters()}
            running = {name: state[name] for name, _ in parts.model.named_buffers() if merged and name in state}
            file = folder / f"{clock.step}.safetensors"
            if role == "reference":
                save_file({name: tensor.detach().contiguous() for name, tensor in (weights | running).items()}, file)
            known = load_file(file)
            trace.parameters.append(_difference(weights, known))
            trace.statistics.append(_difference(running, known))
            if sys.stderr.isatty():
                print(f"\r{clock.step} of {plan.steps} steps ", end="", file=sys.stderr, flush=True)
    return trace


def _odd_rank(parts: Parts, clock: Clock, tensors: dict[str, Tensor]) -> str | None:
    try:
        check_ranks(parts, clock, tensors)
    except RunError as error:
        return str(error).partition(": ")[2]
    return None


def _difference(ours: dict[str, Tensor], known: dict[str, Tensor]) -> tuple[float, str]:
    """‖a - b‖/‖b‖ over all tensors together, and the one that differs most for its size, by how much."""
    if not ours:
        return 0.0, ""
    pairs = [(name, tensor.detach().double(), known[name].double()) for name, tensor in ours.items()]
    away = torch.stack([(a - b).norm() for _, a, b in pairs])
    size = torch.stack([b.norm() for _, _, b in pairs])
    each, total = (away / size).nan_to_num(0, posinf=math.inf), float(away.norm() / size.norm())
    worst = int(each.argmax())
    return math.inf if math.isnan(total) else total, f"most in {pairs[worst][0]} ({float(each[worst]):.1e})"


class _Recorder(Loader):
    """A loader that notes what it hands out for training."""

    def __init__(self, loader: Loader) -> None:
        vars(self).update(vars(loader))
        self.rows: list[Tensor] = []

    def train(self, positions: range, *args: Any, **kwargs: Any) -> Batch:
        batch = super().train(positions, *args, **kwargs)
        if positions:
            place = torch.arange(positions.start, positions.stop)
            self.rows.append(torch.stack([place, batch["index"].cpu(), batch["epoch"].cpu(), _hash(batch).cpu()], 1))
        return batch

    def window(self, runtime: Runtime, size: int) -> tuple[Tensor, Tensor]:
        """(ids, inputs) of all that all processes trained on since the last call, in the order of positions."""
        rows = torch.cat([*self.rows, torch.full((size, 4), -1)])[:size]
        self.rows = []
        rows = runtime.gather(rows).flatten(0, 1)
        rows = rows[rows[:, 0] >= 0]
        rows = rows[rows[:, 0].argsort(stable=True)]
        return rows[:, 1:3], rows[:, 3]


def _hash(batch: Batch) -> Tensor:
    """int64 (B,): of each sample's part of every tensor but ``index`` and ``epoch``."""
    parts = [
        fingerprints(batch[name].flatten(1) if batch[name].dim() > 1 else batch[name][:, None])
        for name in sorted(batch.keys() - {"index", "epoch"})
    ]
    return fingerprints(torch.stack(parts, 1))
