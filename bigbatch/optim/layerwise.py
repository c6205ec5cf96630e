"""What LARS and LAMB share: what a step updates, in which precision, on which path, and over which processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from .rounding import round_stochastically
from .shards import Extents, Groups, Span, checked, local, span_of, sum_over_groups, sum_over_layers
from .trust import Tensors, squares

if TYPE_CHECKING:
    from .triton import Table

Group = dict[str, Any]
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Group]
Kernel = Literal["auto", "fused", "foreach", "triton"]
Copy = tuple[int, Tensor, Tensor, bool]  # place in the optimiser, parameter, what was updated for it, stochastically?
# Yields squares of N tensors, shape (k, N), and is sent those of the whole layers that the tensors are pieces of.
Update = Generator[Tensor, Tensor, None]


@dataclass
class Bucket:
    """What is updated together: N dense tensors of one group, device and dtype, float32 or float64.

    A tensor is a parameter, this process's shard of one, or a segment of a flat partition; ``layers`` are their
    numbers among the layers of ``groups``. ``tensors`` are lists of N by name: w, g, each moment, and on the foreach
    path a scratch, all of one layout, tensor by tensor.
    """

    group: Group
    groups: Groups
    kernel: Kernel
    key: object
    tensors: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    steps: list[Tensor] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    gradient_norm: Tensor | None = None

    def lr(self) -> float | Tensor:
        """The group's rate; a tensor on the weights' device."""
        lr: float | Tensor = self.group["lr"]
        return lr.to(self.tensors["w"][0].device, non_blocking=True) if isinstance(lr, Tensor) else lr


class LayerwiseOptimizer(Optimizer):
    """Base of the layer-wise optimisers. Never writes to a gradient; no value is read on the host but the CPU's.

    kernel: "fused" goes through torch's fused CPU kernels tensor by tensor, "foreach" updates all tensors at once;
    "auto" is fused for whole tensors of the CPU. Neither allocates more than a chunk (``trust.CHUNK``) after the first
    step, but for stochastic rounding. "triton", for CUDA, updates all tensors in one launch, or three where ratios are
    wanted, and has no scratch.

    float32 and float64 parameters are updated in their own precision. bfloat16 and float16 ones have float32 momenta
    and, with low_precision "master", a float32 copy of the weights in the state, made in their first step;
    "stochastic" rounds the new weights at random to one of their neighbours (arXiv:2010.06192) and keeps no copy.

    DTensors, as :func:`fully_shard` makes them, and flat partitions (:meth:`set_segments`) are layers in pieces: the
    norms are those of whole layers, by one all-reduce a step for each process group.

    Parameters without a gradient are skipped. ValueError for an illegal option, a sparse gradient, or a parameter
    that is not of a real floating-point dtype.
    """

    counts_steps = False

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._scratch: dict[object, Tensor] = {}
        self._tables: dict[object, Table] = {}
        self._segments: dict[Tensor, Span] = {}
        super().__init__(params, defaults)

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
            self._update()
        return loss

    def set_segments(
        self,
        partition: Tensor,
        segments: Sequence[tuple[int, int, int]],
        *,
        layers: int,
        group: ProcessGroup | None = None,
    ) -> None:
        """Say which layers a flat parameter holds: (layer, start, stop), elements start to stop − 1.

        For parameters that are one-dimensional partitions of many layers, as under DeepSpeed's ZeRO 1 and 2: each layer
        gets its own trust ratio, from norms over all processes of ``group`` (None: the default group). Layers are
        numbered from 0 to ``layers`` − 1 alike on all of them; a process may hold pieces of some layers or of none, but
        all call this and :meth:`step`. Elements outside the segments are left alone. Not in the state_dict: call it
        again when the optimiser was made, copied or given other parameters. ValueError for segments that do not fit, or
        a partition that is no parameter of this optimiser.
        """
        if not any(partition is p for group in self.param_groups for p in group["params"]):
            raise ValueError(
                f"partition of shape {tuple(partition.shape)}: no parameter of this optimiser; give the very tensor "
                "that is in its param_groups"
            )
        self._segments[partition] = Span((group,), layers, checked(partition, segments, layers))

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with any of the constructor's options for them alone."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that the state of a bfloat16 or float16 parameter stays float32."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if key != "step":
                    self.state[p][key] = value.to(p.device, wide(p.dtype))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_segments", {})
        self._scratch, self._tables = {}, {}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def _check(self, group: Group) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.ndim:
            raise ValueError(f"lr = tensor of shape {tuple(lr.shape)}: give a float or a 0-dim tensor")
        for option in ("lr", "weight_decay", "eps"):
            require(bool(group[option] >= 0), option, group, "give a number >= 0")
        legal = group["kernel"] in ("auto", "fused", "foreach", "triton")
        require(legal, "kernel", group, "choose auto, fused, foreach or triton")
        legal = group["low_precision"] in ("master", "stochastic")
        require(legal, "low_precision", group, "choose master or stochastic")
        for index, p in enumerate(group["params"]):
            if not p.is_floating_point():
                raise ValueError(
                    f"{_name(group, index)}.dtype = {p.dtype}: only real floating-point weights can be trained"
                )
            self._kernel(group, index)

    def _kernel(self, group: Group, index: int) -> Kernel:
        p = group["params"][index]
        where = "in pieces on several processes" if self._span(p).groups else f"on {p.device.type}"
        asked: Kernel = group["kernel"]
        way_out = f"is for whole tensors of the CPU, and {_name(group, index)} is {where}; choose auto"
        require(where == "on cpu" or asked != "fused", "kernel", group, way_out)
        if asked == "triton":
            require(find_spec("triton") is not None, "kernel", group, "install the package triton, or choose auto")
            from .triton import DEVICE

            way_out = "is for CUDA or, slowly, with TRITON_INTERPRET=1 in the environment for the CPU alone, and "
            way_out += f"{_name(group, index)} is on {p.device.type}; choose auto"
            require(p.device.type == DEVICE, "kernel", group, way_out)
        return asked if asked != "auto" else "fused" if where == "on cpu" else "foreach"

    def _span(self, p: Tensor) -> Span:
        return self._segments.get(p) or span_of(p)

    def _update(self) -> None:
        buckets, extents, copies = self._collect()
        if extents and any(group.get("prenormalize") for group in self.param_groups):
            parts = [(bucket.groups, squares(bucket.tensors["g"]).sum()) for bucket in buckets]
            norm = sum_over_groups(parts, extents).sqrt()
            for bucket in buckets:
                bucket.gradient_norm = norm if bucket.group["prenormalize"] else None
        updates: dict[Groups, list[tuple[Update, Tensor, list[int]]]] = {groups: [] for groups in extents}
        for bucket in buckets:
            if bucket.kernel == "fused":
                self._fused(bucket)
                continue
            update = self._triton(bucket, self._table(bucket)) if bucket.kernel == "triton" else self._foreach(bucket)
            if (asked := next(update, None)) is not None:
                updates[bucket.groups].append((update, asked, bucket.layers))
        for groups, waiting in updates.items():
            answers = sum_over_layers([(asked, layers) for _, asked, layers in waiting], groups, extents[groups])
            for (update, _, _), answer in zip(waiting, answers, strict=True):
                with suppress(StopIteration):
                    update.send(answer)
        for place, p, w, stochastic in copies:
            if stochastic:
                round_stochastically(w, p, place=place, step=self.state[p]["step"])
            else:
                local(p).copy_(w)

    def _fused(self, bucket: Bucket) -> None:
        """Update a bucket on the CPU, tensor by tensor while it is in the cache."""
        raise NotImplementedError

    def _foreach(self, bucket: Bucket) -> Update:
        """Update a bucket, all tensors at once."""
        raise NotImplementedError

    def _triton(self, bucket: Bucket, table: Table) -> Update:
        """Update a bucket, all tensors in each launch."""
        raise NotImplementedError

    def _table(self, bucket: Bucket) -> Table:
        """The bucket's tensors as the kernels see them."""
        from .triton import Table

        for w in bucket.tensors["w"]:
            increment_version(w)  # autograd does not see what a kernel writes
        ways = [bucket.tensors[name] for name in ("w", "g", *self._moments(bucket.group))]
        held = self._tables.get(bucket.key)
        if held is None or held.key != Table.made_of(ways):
            held = self._tables[bucket.key] = Table(ways)
        return held

    def _moments(self, group: Group) -> tuple[str, ...]:
        """The names of the state tensors that are shaped like the parameter and start at 0."""
        raise NotImplementedError

    def _collect(self) -> tuple[list[Bucket], Extents, list[Copy]]:
        """What to update, the layers that have pieces here, and what to copy to the parameters afterwards."""
        buckets: dict[object, Bucket] = {}
        extents, copies, steps = Extents(), list[Copy](), list[Tensor]()
        members = [(group, index, p) for group in self.param_groups for index, p in enumerate(group["params"])]
        for place, (group, index, p) in enumerate(members):
            span = self._span(p)
            first = extents.add(p, span, adapt=group["adapt"])
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                where = f"{_name(group, index)}.grad"
                raise ValueError(f"{where} is sparse: make it dense, as by nn.Embedding(sparse=False)")
            w, stochastic = self._weight(p, group)
            if stochastic is not None:
                copies.append((place, p, w, stochastic))
            if stochastic or self.counts_steps:
                steps.append(self._step_count(p, group))
            key = (id(group), w.device, w.dtype, span.groups)
            if key not in buckets:
                buckets[key] = Bucket(group, span.groups, self._kernel(group, index), key)
            self._fill(buckets[key], p, w, span, first)
        if steps:
            torch._foreach_add_(steps, 1)
        return [bucket for bucket in buckets.values() if bucket.layers], extents, copies

    def _fill(self, bucket: Bucket, p: Tensor, w: Tensor, span: Span, first: int) -> None:
        """Add a parameter, updated through w, to a bucket, cut into its segments; ``first`` numbers its first layer."""
        whole = [("w", w), ("g", self._gradient(p, w))]
        whole += [(name, self._state(p, name, w)) for name in self._moments(bucket.group)]
        if bucket.kernel == "foreach":
            whole.append(("scratch", self._lasting("scratch", p, w)))
        for layer, start, stop in ((0, 0, None),) if span.cuts is None else span.cuts:
            for name, tensor in whole:
                bucket.tensors[name].append(tensor if stop is None else tensor[start:stop])
            bucket.layers.append(first + layer)
            if self.counts_steps:
                bucket.steps.append(self.state[p]["step"])

    def _weight(self, p: Tensor, group: Group) -> tuple[Tensor, bool | None]:
        """What is updated for p, and how it is copied to p afterwards: None where it is p itself, else stochastically?

        It is dense and of float32 or float64.
        """
        mine, dtype = local(p).detach(), wide(p.dtype)
        if mine.dtype == dtype and dense(mine):
            return mine, None
        stochastic = mine.dtype != dtype and group["low_precision"] == "stochastic"
        if mine.dtype == dtype or stochastic:
            return self._lasting("weight", p, mine).copy_(mine), stochastic
        if "master" not in self.state[p]:
            self.state[p]["master"] = p.detach().to(dtype)
        return local(self.state[p]["master"]), False

    def _gradient(self, p: Tensor, w: Tensor) -> Tensor:
        """p's gradient in w's dtype and layout: itself, or a copy."""
        g: Any = p.grad
        if hasattr(p, "placements") and g.placements != p.placements:
            g = g.redistribute(placements=p.placements)
        g = local(g)
        return g if g.dtype == w.dtype and alike(g, w) else self._lasting("gradient", p, w).copy_(g)

    def _state(self, p: Tensor, name: str, w: Tensor) -> Tensor:
        """This process's part of the moment of that name, zero at first, in w's dtype and layout."""
        state: dict[str, Tensor] = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p, dtype=w.dtype, memory_format=torch.preserve_format)
        elif state[name].dtype != w.dtype or not alike(local(state[name]), w):  # the model was converted since
            state[name] = torch.zeros_like(p, dtype=w.dtype, memory_format=torch.preserve_format).copy_(state[name])
        return local(state[name])

    def _step_count(self, p: Tensor, group: Group) -> Tensor:
        state: dict[str, Tensor] = self.state[p]
        if "step" not in state:
            device = p.device if group.get("capturable", True) else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        return state["step"]

    def _lasting(self, name: str, p: Tensor, like: Tensor) -> Tensor:
        """A tensor for use within a step, allocated once: dense, and laid out as ``like`` where that is dense."""
        held, dtype = self._scratch.get((name, p)), wide(like.dtype)
        fits = held is not None and (held.shape, held.dtype, held.device) == (like.shape, dtype, like.device)
        if held is None or not fits or (dense(like) and not alike(held, like)):
            held = self._scratch[name, p] = torch.empty_like(like, dtype=dtype)
        return held


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a parameter of ``dtype`` is updated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(t: Tensor) -> bool:
    """Whether t's elements fill their memory without gap or overlap, in whatever order."""
    return t.is_contiguous() or torch.empty_like(t, device="meta").stride() == t.stride()


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order of memory."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def require(legal: bool, option: str, group: Group, way_out: str) -> None:
    """ValueError with option, value and way out unless ``legal``."""
    if not legal:
        raise ValueError(f"{option} = {group[option]!r}: {way_out}")


def descend(w: Tensors, updates: Tensors, lr: float | Tensor, *, scratch: Tensors) -> None:
    """w ← w − γu for each pair; the updates are left as they are unless they are the scratch."""
    if isinstance(lr, Tensor):
        if updates is not scratch:
            torch._foreach_copy_(scratch, updates)
        torch._foreach_mul_(scratch, lr)
        torch._foreach_sub_(w, scratch)
    else:
        torch._foreach_add_(w, updates, alpha=-lr)


def _name(group: Group, index: int) -> str:
    names = group.get("param_names")
    return str(names[index]) if names else f"params[{index}] of shape {tuple(group['params'][index].shape)}"
