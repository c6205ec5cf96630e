"""Replicas that share out the optimiser's state."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from bigbatch.config.models import Parallel

from .strategy import Replicas, State

# Renamed by torch 2.14, which warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

MEMBERS = ("params", "param_names")
"""What a parameter group has one of for each parameter."""

ALIGNMENT = 64
"""Bytes: where a parameter may begin in a buffer, for the sake of vector instructions."""

PADDED = 1.25
"""The most that padding its rows to one length may make a buffer, of what it is without."""


class Zero1(Replicas):
    """``zero1``: each process steps its own parameters, and holds the optimiser's state of no others.

    ZeRO stage 1 (Rajbhandari et al. 2019, arXiv:1910.02054). Gradients are summed by DistributedDataParallel, so that
    every process has them whole. The new parameters travel after the step, in place: they are views of a buffer per
    device and dtype, in which each process has a row. Rows of one length take one all-gather. But no row is shorter
    than the largest layer in it, and padding the others to that costs more with each process (ResNet-50 on 64: 5.9
    times the parameters); so where it costs too much (`row_lengths`), each row is broadcast by its owner.

    Differs from the paper: split by whole parameters (`owners`), not through them, so that any optimiser works as it
    is, layer-wise ones too. Takes over the ``optimizer``, which is one of all parameters, with no step taken.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, wrap: Callable[[nn.Module], nn.Module], parallel: Parallel
    ) -> None:
        self._rank, world_size = dist.get_rank(), dist.get_world_size()
        self._members = [{key: group[key] for key in MEMBERS if key in group} for group in optimizer.param_groups]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._owner = dict(zip(params, owners([p.nbytes for p in params], world_size), strict=True))
        super().__init__(model, optimizer, wrap=wrap, parallel=parallel)
        self._buffers = _lay_out(self._owner, world_size)
        for p in params:
            if self._owner[p] != self._rank:
                optimizer.state.pop(p, None)
        self._keep_mine()

    def step(self) -> None:
        self.optimizer.step()
        pending: list[Any] = []
        for buffer, rows in self._buffers:
            if len({len(row) for row in rows}) == 1:
                pending.append(_all_gather(buffer, rows[self._rank], async_op=True))
            else:
                pending += [dist.broadcast(row, src, async_op=True) for src, row in enumerate(rows) if len(row)]
        for work in pending:
            work.wait()

    def optimizer_state(self) -> State:
        with self._all_parameters():
            whole = self.optimizer.state_dict()
        states = {}
        for index, (p, owner) in enumerate(self._owner.items()):
            box: list[Any] = [_on_cpu(self.optimizer.state.get(p, {})) if owner == self._rank else None]
            if owner == self._rank != 0:
                dist.send_object_list(box, dst=0)
            elif owner != self._rank == 0:
                dist.recv_object_list(box, src=owner)
            states[index] = box[0]
        return {**whole, "state": {index: state for index, state in states.items() if state}}

    def load(self, model: State, optimizer: State) -> None:
        states = optimizer["state"]
        mine = {i: states[i] for i, owner in enumerate(self._owner.values()) if owner == self._rank and i in states}
        with self._all_parameters():
            super().load(model, {**optimizer, "state": mine})

    @contextmanager
    def _all_parameters(self) -> Iterator[None]:
        """Meanwhile the optimiser's groups list the parameters of all processes, as in a state dict."""
        for group, members in zip(self.optimizer.param_groups, self._members, strict=True):
            group.update(members)
        yield
        self._keep_mine()

    def _keep_mine(self) -> None:
        for group, members in zip(self.optimizer.param_groups, self._members, strict=True):
            mine = [self._owner[p] == self._rank for p in members["params"]]
            group.update({key: [*compress(all_, mine)] for key, all_ in members.items()})


def owners(sizes: Sequence[int], world_size: int) -> list[int]:
    """The process of each thing of these sizes: the largest first, each to the one with the least so far.

    Longest processing time first (Graham 1969), at most (4 - 1/world size)/3 of the best balance there is; of equals
    the first. A function of its arguments alone.
    """
    loads = [(0, rank) for rank in range(world_size)]
    found = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, found[index] = loads[0]
        heapq.heapreplace(loads, (load + sizes[index], found[index]))
    return found


def row_lengths(filled: Sequence[int]) -> list[int]:
    """Lengths of the rows of a buffer, of which this much is filled: that of the longest for all, if the buffer is then
    at most `PADDED` times what is filled; else as they are. A function of its argument alone."""
    even = [max(filled)] * len(filled)
    return even if sum(even) <= PADDED * sum(filled) else [*filled]


def _lay_out(owner: dict[Tensor, int], world_size: int) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Move parameters into flat buffers, one per device and dtype, each into the row of its process.

    Returns the buffers, each with its rows: views of it, one after the other, by rank.
    """
    kinds: defaultdict[tuple[torch.device, torch.dtype], list[list[Tensor]]] = defaultdict(
        lambda: [[] for _ in range(world_size)]
    )
    for p, rank in owner.items():
        kinds[p.device, p.dtype][rank].append(p)
    buffers = []
    for (device, dtype), shares in kinds.items():
        step = max(1, ALIGNMENT // dtype.itemsize)
        places = [[*accumulate((-(-p.numel() // step) * step for p in share), initial=0)] for share in shares]
        lengths = row_lengths([place[-1] for place in places])
        buffer = torch.zeros(sum(lengths), dtype=dtype, device=device)
        rows = torch.split(buffer, lengths)
        for row, place, params in zip(rows, places, shares, strict=True):
            for p, start in zip(params, place, strict=False):
                # The strides of a dense tensor are kept: a channels-last weight stays one.
                strides = torch.empty_like(p, device="meta").stride()
                view = row[start:].as_strided(p.shape, strides)
                p.data = view.copy_(p.data)
        buffers.append((buffer, rows))
    return buffers


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
