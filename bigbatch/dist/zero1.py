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


class Zero1(Replicas):
    """``zero1``: each process steps its own parameters, and holds the optimiser's state of no others.

    ZeRO stage 1 (Rajbhandari et al. 2019, arXiv:1910.02054). Gradients are summed by DistributedDataParallel, so that
    every process has them whole. The new parameters travel after the step in one all-gather per device and dtype, in
    place: they are views of a buffer that has a row for each process.

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
        for rows in self._buffers:
            _all_gather(rows.view(-1), rows[self._rank])

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


def _lay_out(owner: dict[Tensor, int], world_size: int) -> list[Tensor]:
    """Move parameters into buffers (world size, share), one per device and dtype, each into its process's row."""
    kinds: defaultdict[tuple[torch.device, torch.dtype], list[list[Tensor]]] = defaultdict(
        lambda: [[] for _ in range(world_size)]
    )
    for p, rank in owner.items():
        kinds[p.device, p.dtype][rank].append(p)
    buffers = []
    for (device, dtype), rows in kinds.items():
        step = max(1, ALIGNMENT // dtype.itemsize)
        places = [[*accumulate((-(-p.numel() // step) * step for p in row), initial=0)] for row in rows]
        buffer = torch.zeros(world_size, max(place[-1] for place in places), dtype=dtype, device=device)
        for row, place, params in zip(buffer, places, rows, strict=True):
            for p, start in zip(params, place, strict=False):
                # The strides of a dense tensor are kept: a channels-last weight stays one.
                strides = torch.empty_like(p, device="meta").stride()
                view = row[start:].as_strided(p.shape, strides)
                p.data = view.copy_(p.data)
        buffers.append(buffer)
    return buffers


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
