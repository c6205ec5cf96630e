"""One optimiser step, from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from bigbatch.clip import clip_held
from bigbatch.data import shares
from bigbatch.keyed import fold

from .state import Parts, StepReport


def train_step(parts: Parts, *, samples: int, stop: bool = False) -> StepReport:
    """Train on the window that starts after ``samples`` samples.

    The gradient is Σ loss / Σ weight over the whole window, whatever the number of processes, the accumulation and the
    size of the window. One gradient exchange per step carries the sums of losses and weights too, and whether a process
    is to ``stop``; where it cannot, an all-reduce of the three runs beside the last backward pass. A gradient that is
    not finite changes nothing but the clock.
    """
    plan, runtime, task, strategy = parts.plan, parts.runtime, parts.task, parts.strategy
    enter = runtime.progress.enter
    size, lr = plan.window(samples), plan.lr(samples)
    pieces, window = my_pieces(parts, samples), shift(range(size), samples)
    # Gradients are as large on their way whether the exchange divides them or not.
    scale = parts.scale.value * plan.world_size / strategy.divides_by if parts.scale else 1.0
    factor = strategy.divides_by * scale / size
    strategy.zero_grad()
    totals = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    totals[2] = stop
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        enter("data")
        batch = parts.loader.train(shift(piece, samples), window=window)
        enter("forward")
        parts.stats.empty(not piece)
        with strategy.exchange(when=last):
            with runtime.autocast(), dropout(parts, shift(piece, samples), window):
                loss, weight = task.loss(strategy.wrapped, batch)
            if not piece:
                loss, weight = loss * 0, weight * 0
            totals[:2] += torch.stack([loss.detach(), weight])
            if last:
                enter("exchange")
            if last and not strategy.carries:
                arrive = runtime.start_sum(totals)
            strategy.backward(loss, factor, totals)
    if not strategy.carries:
        arrive()

    # So far the gradient is scaled, and divided by the samples where it should be by their weight.
    held = strategy.held()
    if parts.scale or not task.weight_is_count:
        share = 1.0 if task.weight_is_count else size / totals[1]
        torch._foreach_mul_([gradient for _, gradient in held], share / scale)
    clip = parts.config.clip
    norm = float(clip_held(held, kind=clip.kind, max=clip.max, sum_parts=strategy.sum_parts))
    enter("update")
    finite = norm < float("inf")
    if finite:
        for group in strategy.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        strategy.step()
        parts.stats.commit(size)
    else:
        strategy.skip()
        parts.stats.discard()
    if parts.scale:
        parts.scale.update(finite=finite)

    total, weight, stops = totals.tolist()
    mean = total / weight if weight else math.nan
    return StepReport(loss=mean, lr=lr, grad_norm=norm, global_batch=size, skipped=not finite, stop=stops > 0)


def my_pieces(parts: Parts, samples: int) -> list[range]:
    """This process's part of each micro-step of the window after ``samples`` samples, as positions in the window."""
    plan = parts.plan
    micro, world_size = plan.micro_batch, plan.world_size
    accumulation = plan.batch(samples) // (micro * world_size)
    rows = shares(plan.window(samples), micro=micro, world_size=world_size, accumulation=accumulation, span=plan.span)
    return [row[parts.runtime.rank] for row in rows]


def upcoming(parts: Parts, samples: int) -> Iterator[tuple[range, range]]:
    """Positions and window of every batch that this process trains on after ``samples`` samples."""
    while samples < parts.plan.stop_samples:
        window = shift(range(parts.plan.window(samples)), samples)
        for piece in my_pieces(parts, samples):
            yield shift(piece, samples), window
        samples += len(window)


def dropout(parts: Parts, piece: range, window: range) -> AbstractContextManager[Any]:
    """The random numbers of a forward pass over ``piece`` of the ``window``, both positions in the stream."""
    parts.runtime.seed(fold(parts.config.seed, piece.start))
    return parts.dropout.at(piece, window) if parts.dropout else nullcontext()


def shift(piece: range, samples: int) -> range:
    """A piece of the window as positions in the stream of samples."""
    return range(samples + piece.start, samples + piece.stop)
