"""Sharding by torch's fully_shard (FSDP2)."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .strategy import Build, Reduce, State, Strategy, make_plain

# Renamed by torch 2.14, which warns of the old name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class FullySharded(Strategy):
    """``fsdp2``: each process holds its rows of every parameter, gradient and state of the optimiser.

    Zhao et al. 2023, arXiv:2304.11277, and ZeRO stage 3 (Rajbhandari et al. 2019, arXiv:1910.02054). Rows are those of
    the first dimension; a parameter with fewer than there are processes is nothing on some. The parameters of a unit
    (`units`) are gathered for its forward and again for its backward pass; gradients are summed in one reduce-scatter
    per unit after the last backward pass, and collected whole before. ``rounds_to`` is the dtype that they travel in.

    Raises ValueError for a parameter that cannot be cut.
    """

    lockstep = True

    def __init__(
        self, model: nn.Module, build: Build, *, sum_parts: Reduce, device: torch.device, rounds_to: torch.dtype | None
    ) -> None:
        make_plain(model, strategy="fsdp2")
        self.sum_parts = sum_parts
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for unit in (*units(model), model):
            sharded: FSDPModule = fully_shard(unit, mesh=mesh)
            # Sums, not means: a mean of three is not exact, and a premultiplied sum is NCCL's alone.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
            if rounds_to:
                sharded.set_custom_reduce_scatter(_Rounded(rounds_to))  # type: ignore[arg-type]
        super().__init__(model, build(model))
        self.wrapped = model

    def exchange(self, *, when: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(when)
        return nullcontext()

    def held(self) -> list[tuple[Tensor, Tensor]]:
        return [(part(p), part(p.grad)) for p in self._parameters if p.grad is not None]

    def model_state(self) -> State:
        return _whole(self.model.state_dict())

    def optimizer_state(self) -> State:
        parts = self.optimizer.state_dict()
        return {**parts, "state": {index: _whole(state) for index, state in parts["state"].items()}}

    def load(self, model: State, optimizer: State) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = {
            index: {key: _cut(value, params[index]) for key, value in state.items()}
            for index, state in optimizer["state"].items()
        }
        super().load(model, {**optimizer, "state": states})

    def load_model(self, model: State, *, strict: bool = True) -> None:
        mine = self.model.state_dict()
        super().load_model({name: _cut(tensor, mine.get(name)) for name, tensor in model.items()}, strict=strict)


def units(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time, besides the rest of the model: the blocks of a ResNet, ViT or BERT.

    They are the elements of each outermost nn.Sequential and nn.ModuleList that have modules of their own, unless they
    share a parameter with what is outside, as tied embeddings do.
    """
    uses = Counter(p for _, p in model.named_parameters(remove_duplicate=False))

    def closed(block: nn.Module) -> bool:
        inside = Counter(p for _, p in block.named_parameters(remove_duplicate=False))
        return all(uses[p] == count for p, count in inside.items())

    return [block for block in _blocks(model) if closed(block)]


def _blocks(module: nn.Module) -> list[nn.Module]:
    found = []
    for child in module.children():
        # A list has no forward pass of its own to gather for.
        whole = not isinstance(child, nn.ModuleList | nn.ModuleDict) and any(True for _ in child.children())
        if isinstance(module, nn.Sequential | nn.ModuleList) and whole:
            found.append(child)
        else:
            found += _blocks(child)
    return found


def part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; the tensor where it is whole here."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(parts: State) -> State:
    """The tensors of a dictionary put together from all processes' parts, one at a time, in rank 0's CPU memory."""
    whole = {}
    for name, value in parts.items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            whole[name] = value.cpu() if isinstance(value, Tensor) else value
    return whole


def _cut(value: Any, like: Tensor | None) -> Any:
    """This process's part of a whole tensor, where it is cut as ``like``; anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


class _Rounded:
    """A reduce-scatter of numbers rounded to ``dtype``. FSDP2's own ``reduce_dtype`` would also round every sum that
    accumulates before it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        rounded = torch.empty_like(output_tensor, dtype=self.dtype)
        _reduce_scatter(rounded, input_tensor.to(self.dtype), op, group)
        output_tensor.copy_(rounded)
