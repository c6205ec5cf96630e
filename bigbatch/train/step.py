"""One optimiser step, from top to bottom."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from bigbatch.clip import clip_gradients
from bigbatch.data import shares
from bigbatch.keyed import fold

from .state import Parts, StepReport


def train_step(parts: Parts, *, samples: int, want_loss: bool) -> StepReport:
    """Train on the window that starts after ``samples`` samples.

    The gradient is Σ loss / Σ weight over the whole window, whatever the number of processes, the accumulation and the
    size of the window. One gradient exchange per step; one more all-reduce where the weights are not sample counts, and
    one of the loss when it is asked for. A gradient that is not finite changes nothing but the clock.
    """
    plan, runtime, task = parts.plan, parts.runtime, parts.task
    size, lr = plan.window(samples), plan.lr(samples)
    pieces, window = my_pieces(parts, samples), shift(range(size), samples)
    scale = parts.scale.value if parts.scale else 1.0

    # DistributedDataParallel divides the sum over processes by their number, which this undoes.
    factor = runtime.world_size * scale / size
    parts.optimizer.zero_grad(set_to_none=True)
    total, weight = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for number, piece in enumerate(pieces):
        batch = parts.loader.train(shift(piece, samples), window=window)
        parts.stats.empty(not piece)
        with runtime.exchange(parts.wrapped, when=number == len(pieces) - 1):
            with runtime.autocast(), dropout(parts, shift(piece, samples), window):
                loss, its_weight = task.loss(parts.wrapped, batch)
            if not piece:
                loss, its_weight = loss * 0, its_weight * 0
            torch.autograd.backward(loss * factor)
        total += loss.detach()
        weight += its_weight

    # So far the gradient is scaled, and divided by the samples where it should be by their weight.
    if task.weight_is_count:
        weight.fill_(size)
    else:
        runtime.sum(weight)
    if parts.scale or not task.weight_is_count:
        gradients = [p.grad for p in parts.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, size / weight / scale)
    clip = parts.config.clip
    norm = float(clip_gradients(parts.model.parameters(), kind=clip.kind, max=clip.max))
    finite = norm < float("inf")
    if finite:
        for group in parts.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        parts.optimizer.step()
        parts.stats.commit(size)
    else:
        parts.stats.discard()
    if parts.scale:
        parts.scale.update(finite=finite)

    mean = None
    if want_loss:
        runtime.sum(total)
        mean = float(total / weight)
    return StepReport(loss=mean, lr=lr, grad_norm=norm, global_batch=size, skipped=not finite)


def my_pieces(parts: Parts, samples: int) -> list[range]:
    """This process's part of each micro-step of the window after ``samples`` samples, as positions in the window."""
    plan = parts.plan
    micro, world_size = plan.micro_batch, plan.world_size
    accumulation = plan.batch(samples) // (micro * world_size)
    rows = shares(plan.window(samples), micro=micro, world_size=world_size, accumulation=accumulation, span=plan.span)
    return [row[parts.runtime.rank] for row in rows]


def dropout(parts: Parts, piece: range, window: range) -> AbstractContextManager[Any]:
    """The random numbers of a forward pass over ``piece`` of the ``window``, both positions in the stream."""
    torch.manual_seed(fold(parts.config.seed, piece.start))
    return parts.dropout.at(piece, window) if parts.dropout else nullcontext()


def shift(piece: range, samples: int) -> range:
    """A piece of the window as positions in the stream of samples."""
    return range(samples + piece.start, samples + piece.stop)
