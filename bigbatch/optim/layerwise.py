"""What LARS and LAMB share: the closure, one device and dtype at a time, and errors that name the parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from .trust import Tensors

Group = dict[str, Any]
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Group]


class LayerwiseOptimizer(Optimizer):
    """Base of the layer-wise optimisers. Never writes to a gradient and never reads a tensor's value on the host.

    Parameters without a gradient are skipped. ValueError for an illegal option, a sparse gradient, or a parameter
    that is not of a real floating-point dtype.
    """

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; returns what ``closure``, which re-evaluates the loss with gradients on, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._update([(group, params) for group in self.param_groups for params in _buckets(group)])
        return loss

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with any of the constructor's options for them alone."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check(self, group: Group) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.ndim:
            raise ValueError(f"lr = tensor of shape {tuple(lr.shape)}: give a float or a 0-dim tensor")
        for field in ("lr", "weight_decay", "eps"):
            require(bool(group[field] >= 0), field, group, "give a number >= 0")
        for index, p in enumerate(group["params"]):
            if not p.is_floating_point():
                raise ValueError(
                    f"{_name(group, index)}.dtype = {p.dtype}: only real floating-point weights can be trained"
                )

    def _update(self, buckets: list[tuple[Group, list[Tensor]]]) -> None:
        raise NotImplementedError

    def _state(self, p: Tensor, key: str) -> Tensor:
        """The state tensor shaped like ``p``, zero at first; dtype and layout are the parameter's."""
        state: dict[str, Tensor] = self.state[p]
        if key not in state:
            state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state[key]


def require(legal: bool, field: str, group: Group, way_out: str) -> None:
    """ValueError with field, value and way out unless ``legal``."""
    if not legal:
        raise ValueError(f"{field} = {group[field]!r}: {way_out}")


def gradients(params: Tensors) -> list[Tensor]:
    """The gradients of parameters that all have one."""
    return [p.grad for p in params if p.grad is not None]


def rate_and_path(group: Group, params: Tensors) -> Group:
    """``lr`` and ``foreach`` for one device: a tensor rate is moved there; None is foreach but on the CPU."""
    device, lr, foreach = params[0].device, group["lr"], group["foreach"]
    moved = lr.to(device, non_blocking=True) if isinstance(lr, Tensor) else lr
    return {"lr": moved, "foreach": device.type != "cpu" if foreach is None else foreach}


def descend(params: Tensors, updates: Tensors, lr: float | Tensor) -> None:
    """w ← w − γu for each pair; the updates are left as they are."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(updates, lr))
    else:
        torch._foreach_add_(params, updates, alpha=-lr)


def _buckets(group: Group) -> list[list[Tensor]]:
    """The group's parameters that have a gradient, by device and dtype."""
    buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for index, p in enumerate(group["params"]):
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(f"{_name(group, index)}.grad is sparse: make it dense, as by nn.Embedding(sparse=False)")
        buckets.setdefault((p.device, p.dtype), []).append(p)
    return list(buckets.values())


def _name(group: Group, index: int) -> str:
    names = group.get("param_names")
    return str(names[index]) if names else f"params[{index}] of shape {tuple(group['params'][index].shape)}"
