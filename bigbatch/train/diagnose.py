"""Where a gradient that is not finite comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .state import Parts
from .step import dropout, my_pieces, shift

NAMED = 8  # samples that a message names at most


def diagnose(parts: Parts, samples: int) -> str:
    """Take the passes of the window after ``samples`` samples again, on all processes, and tell what is not finite.

    Names for each process the first layer whose output is not finite, else the layer nearest to the loss whose gradient
    is not, and the ids of the samples that show it. A collective. Gradients and statistics are forgotten afterwards.
    """
    found = parts.runtime.collect(_first(parts, samples))
    parts.strategy.skip()
    parts.stats.discard()
    named = [f"rank {rank}: {what}" for rank, what in enumerate(found) if what]
    return "; ".join(named) or "the passes of each process are finite, their sum is not"


def _first(parts: Parts, samples: int) -> str | None:
    found = None
    window = shift(range(parts.plan.window(samples)), samples)
    parts.strategy.zero_grad()
    for piece in my_pieces(parts, samples):  # all of them: a pass may be a collective
        positions = shift(piece, samples)
        batch = parts.loader.train(positions, window=window)
        outputs: list[tuple[str, list[int]]] = []
        for name, tensor in batch.items():
            _note(outputs, f"data, {name}", tensor, len(batch["index"]))
        with parts.strategy.exchange(when=False), _watched(parts, outputs, len(batch["index"])):
            with parts.runtime.autocast(), dropout(parts, positions, window):
                loss, _ = parts.task.loss(parts.strategy.wrapped, batch)
            _note(outputs, "the loss", loss.detach(), 0)
            scale = parts.scale.value if parts.scale else 1.0
            parts.strategy.backward(loss, scale / len(window))
        if not outputs:
            names = [name for name, p in parts.model.named_parameters() if p.grad is not None and _bad(p.grad).any()]
            outputs = [(f"the gradient of {name}", []) for name in reversed(names)]
        if outputs and piece and not found:
            name, rows = outputs[0]
            found = f"{name} is not finite for {_samples(batch, rows)}"
    return found


@contextmanager
def _watched(parts: Parts, outputs: list[tuple[str, list[int]]], size: int) -> Iterator[None]:
    """Notes the layers whose output is not finite, in the order in which they are called."""

    def watch(name: str) -> Any:
        return lambda module, args, output: _note(outputs, name, output, size)

    leaves = [(name, module) for name, module in parts.model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(watch(f"the output of {name or 'the model'}")) for name, module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(outputs: list[tuple[str, list[int]]], name: str, output: Any, size: int) -> None:
    if isinstance(output, Tensor) and output.is_floating_point() and (bad := _bad(output)).any():
        rows = bad.reshape(size, -1).any(1) if size and len(output) == size else bad.new_zeros(0)
        outputs.append((name, rows.nonzero().flatten().tolist()))


def _bad(tensor: Tensor) -> Tensor:
    return ~torch.isfinite(tensor.detach())


def _samples(batch: dict[str, Tensor], rows: list[int]) -> str:
    ids = batch["index"].tolist()
    ids = [ids[row] for row in rows] if rows else ids
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return f"samples {', '.join(map(str, ids[:NAMED]))}{more}"
