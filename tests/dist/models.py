"""A small model with all that makes cutting hard, and runs of it under a strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.config import RunConfig
from bigbatch.config.models import Parallel
from bigbatch.dist import Runtime, Strategy
from bigbatch.optim import build_optimizer
from train.assembled import BASE

ROWS = 12


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 7), nn.Linear(7, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.up(x).tanh()))


class Odd(nn.Module):
    """Tied embeddings, a frozen weight, a parameter with fewer rows than processes, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.decode = nn.Embedding(11, 5), nn.Linear(5, 11)
        self.decode.weight = self.embed.weight
        self.blocks = nn.ModuleList([Block(5), Block(5)])
        self.blocks[1].up.weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.full((5,), 0.1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.decode(x) * self.scale


def odd(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Odd().to(dtype)


def prepared(model: nn.Module, optim: dict[str, Any], dtype: torch.dtype = torch.float64, **parallel: Any) -> Strategy:
    precision = "fp64" if dtype == torch.float64 else "fp32"
    runtime = Runtime(precision=precision, parallel=Parallel.model_validate(parallel))
    config = RunConfig.model_validate(BASE | {"optim": {"lr": 0.01, **optim}}).optim
    return runtime.prepare(model, lambda model: build_optimizer(config, model))


def accumulate(made: Strategy, number: int, *, rank: int, world: int, pieces: int = 2) -> None:
    """The gradient of step ``number``, of a batch that does not depend on how it is shared out."""
    ids = torch.randint(11, (ROWS, 3), generator=torch.Generator().manual_seed(number))
    mine = ids[rank::world].chunk(pieces)
    made.zero_grad()
    for k, piece in enumerate(mine):
        with made.exchange(when=k == len(mine) - 1):
            loss = -made.wrapped(piece).log_softmax(-1)[..., 0].sum()
            made.backward(loss * made.divides_by / ROWS)


def chain(rank: int, optim: dict[str, Any], strategies: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Two steps under each strategy, every next one from the states that rank 0 had; the last states, and the bytes of
    optimiser state that this process held."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    states: Any = None
    for leg, strategy in enumerate(strategies):
        made = prepared(odd(), optim, strategy=strategy)
        if states:
            made.load(*states)
        for number in (2 * leg, 2 * leg + 1):
            accumulate(made, number, rank=rank, world=world)
            made.step()
        states = made.model_state(), made.optimizer_state()
        if world > 1:
            box = [states]
            torch.distributed.broadcast_object_list(box, src=0)
            states = box[0]
    tensors = [t for state in made.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    held = sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)
    return *states, held
