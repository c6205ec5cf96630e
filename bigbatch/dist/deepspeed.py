"""DeepSpeed's ZeRO stages 0, 1 and 2 (Rajbhandari et al. 2019, arXiv:1910.02054), under Hugging Face Accelerate."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from datetime import timedelta
from importlib.util import find_spec
from itertools import chain, count
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

from bigbatch.config.models import Parallel

from .strategy import Reduce, State, Strategy, make_plain

BUCKET = 25_000_000
"""Elements that are summed at a time, in a buffer of 100 MB; DeepSpeed's default takes 2 GB."""

LAUNCHER = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_CONFIG_DS_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_GRADIENT_")

Prepare = Callable[[nn.Module, Optimizer], Sequence[Any]]


def forget_launcher() -> None:
    """Drop what ``accelerate launch`` was told about DeepSpeed from the environment: the recipe says it all."""
    for name in [name for name in os.environ if name.startswith(LAUNCHER)]:
        del os.environ[name]


def deepspeed_accelerator(parallel: Parallel) -> Accelerator:
    """An Accelerator that has DeepSpeed set up the processes. ValueError where that is not installed."""
    for package in ("deepspeed", "transformers"):  # Accelerate asks the second for its DeepSpeed configuration
        if find_spec(package) is None:
            raise ValueError(
                f"parallel.strategy = deepspeed: {package} is not installed; pip install 'bigbatch[deepspeed]', or use "
                "zero1 or fsdp2"
            )
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with redirect_stdout(sys.stderr):  # for what it logs, then and later
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    # It would first compile collectives of its own for the CPU, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config: dict[str, Any] = {
        # It only checks and counts these two; the windows are bigbatch's.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage_of(parallel), "reduce_bucket_size": BUCKET},
    }
    if parallel.compression != "none":
        config["communication_data_type"] = parallel.compression
    process_group = InitProcessGroupKwargs(timeout=timedelta(seconds=parallel.timeout))
    if not cuda:
        process_group.backend = "gloo"
    try:
        return Accelerator(
            mixed_precision="no",
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            kwargs_handlers=[process_group],
        )
    finally:
        forget_launcher()  # Accelerate says so to child processes too


def stage_of(parallel: Parallel) -> int:
    """ZeRO's stage; 1 unless the recipe says otherwise."""
    return 1 if parallel.zero_stage is None else parallel.zero_stage


class Zero0(Strategy):
    """``deepspeed``, ZeRO 0: every process holds everything, and DeepSpeed sums the gradients.

    The model is called itself, not through the engine, which would switch off an autocast around it. Raises ValueError
    for a parameter that DeepSpeed does not take, and where it turns out to be other than expected.
    """

    fills_gaps = True

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, prepare: Prepare, stage: int) -> None:
        import deepspeed

        make_plain(model, strategy="deepspeed")
        super().__init__(model, optimizer)
        self._engine, _ = prepare(model, optimizer)
        self.divides_by = dist.get_world_size()
        _require(
            isinstance(self._engine, deepspeed.DeepSpeedEngine)
            and self._engine.module is model
            and self._engine.zero_optimization_stage() == stage
            and self._engine.dp_world_size == self.divides_by,
            f"Accelerate gave no engine of ZeRO {stage} on {self.divides_by} processes",
        )
        self.wrapped = model

    def exchange(self, *, when: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(when)
        return nullcontext()

    def backward(self, loss: Tensor, factor: float = 1.0, totals: Tensor | None = None) -> None:
        self._engine.backward(loss * factor)


class Zero12(Zero0):
    """``deepspeed``, ZeRO 1 and 2: each process steps its partition of every parameter group.

    The parameters of a group lie one after the other in one flat tensor, cut into equal partitions without regard to
    layers; the optimiser's only parameter in that group is this process's partition (`pieces`). LARS and LAMB still
    have their trust ratios for layers (`set_layers`), in one all-reduce for all of them. Gradients are summed after the
    last backward pass (1) or after each, so that they never accumulate whole (2).

    Differs from the paper: DeepSpeed sums gradients by all-reduce and keeps its part. Its step is left out, since that
    steps one group at a time. A partition is the memory of the weights, not DeepSpeed's second copy, so what writes
    weights in place is safe.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, prepare: Prepare, stage: int, sum_parts: Reduce
    ) -> None:
        self._layers = [list(group["params"]) for group in optimizer.param_groups]
        whole = optimizer.state_dict()
        super().__init__(model, optimizer, prepare=prepare, stage=stage)
        self.sum_parts = sum_parts
        self._zero = self._engine.optimizer
        self._zero.optimizer = optimizer  # in place of an Adagrad of its own, which has one group
        known = all(hasattr(self._zero, name) for name in ("averaged_gradients", "update_lp_params"))
        _require(known, "it steps in another way")
        self._partitions = [
            _in_place(group["params"], layers)
            for group, layers in zip(optimizer.param_groups, self._layers, strict=True)
        ]
        set_layers(optimizer, self._layers)
        if whole["state"]:  # as Adagrad's is from its construction
            self.load(model.state_dict(), whole)

    def backward(self, loss: Tensor, factor: float = 1.0, totals: Tensor | None = None) -> None:
        super().backward(loss, factor)
        if self._engine.is_gradient_accumulation_boundary():
            averaged = self._zero.averaged_gradients
            for number, partition in enumerate(self._partitions):
                partition.grad = torch.cat([gradient.reshape(-1) for gradient in averaged[number]])
                averaged[number] = None

    def zero_grad(self) -> None:
        self._zero.zero_grad()
        for partition in self._partitions:
            partition.grad = None

    def held(self) -> list[tuple[Tensor, Tensor]]:
        return [(p.detach(), p.grad) for p in self._partitions if p.grad is not None]

    def step(self) -> None:
        self.optimizer.step()
        self._zero.update_lp_params()

    def optimizer_state(self) -> State:
        whole, numbers = self.optimizer.state_dict(), count()
        states: dict[int, State] = {}
        for number, (group, layers) in enumerate(zip(whole["param_groups"], self._layers, strict=True)):
            group["params"] = [next(numbers) for _ in layers]
            state = {key: _gather(value) for key, value in whole["state"].get(number, {}).items()}
            if state and dist.get_rank() == 0:
                states |= {i: _of_layer(state, p) for i, p in zip(group["params"], layers, strict=True)}
        return {**whole, "state": states}

    def load(self, model: State, optimizer: State) -> None:
        shaped = {key for state in optimizer["state"].values() for key, value in state.items() if _has_shape(value)}
        states, groups = {}, []
        for number, (group, layers) in enumerate(zip(optimizer["param_groups"], self._layers, strict=True)):
            theirs = [optimizer["state"].get(i, {}) for i in group["params"]]
            partition = self._partitions[number]
            states[number] = {key: value for state in theirs for key, value in state.items() if key not in shaped}
            for key in shaped.intersection(chain(*theirs)):
                flat = states[number][key] = torch.zeros_like(partition)
                for layer, start, stop, first in pieces(layers, partition):
                    if key in theirs[layer]:
                        flat[start:stop] = theirs[layer][key].reshape(-1)[first : first + stop - start]
            groups.append({**group, "params": [number]})
        super().load(model, {**optimizer, "state": states, "param_groups": groups})


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` − 1 of a partition: those of a layer from its element ``first`` on."""

    layer: int
    start: int
    stop: int
    first: int


def pieces(layers: Sequence[Tensor], partition: Tensor, *, group: dist.ProcessGroup | None = None) -> list[Piece]:
    """What lies in this process's partition of the flat tensor that ``layers`` are views of."""
    found, size = [], len(partition)
    for layer, p in enumerate(layers):
        begin = int(p.storage_offset()) - dist.get_rank(group) * size
        start, stop = max(begin, 0), min(begin + p.numel(), size)
        if start < stop:
            found.append(Piece(layer, start, stop, start - begin))
    return found


@runtime_checkable
class Layerwise(Protocol):
    """An optimiser that wants to know the layers in a flat parameter, as bigbatch's LARS and LAMB do."""

    def set_segments(
        self,
        partition: Tensor,
        segments: Sequence[tuple[int, int, int]],
        *,
        layers: int,
        group: dist.ProcessGroup | None = None,
    ) -> None: ...


def set_layers(
    optimizer: Optimizer, layers: Sequence[Sequence[Tensor]], *, group: dist.ProcessGroup | None = None
) -> None:
    """Tell LARS or LAMB which layers are in the partitions that DeepSpeed's ZeRO 1 or 2 has made its parameters.

    For a user of ``deepspeed.initialize``; a run of ``parallel.strategy: deepspeed`` does it itself::

        layers = [list(group["params"]) for group in optimizer.param_groups]
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        set_layers(optimizer, layers)

    ``group`` has the processes that hold the partitions (None: the default group). Other optimisers are left alone.
    """
    if isinstance(optimizer, Layerwise):
        for param_group, theirs in zip(optimizer.param_groups, layers, strict=True):
            (partition,) = param_group["params"]
            segments = [(layer, start, stop) for layer, start, stop, _ in pieces(theirs, partition, group=group)]
            optimizer.set_segments(partition, segments, layers=len(theirs), group=group)


def _require(good: bool, what: str) -> None:
    if not good:
        import deepspeed

        raise ValueError(
            f"parallel.strategy = deepspeed: DeepSpeed {deepspeed.__version__} is not as bigbatch knows it: {what}; "
            "install another release, or use zero1 or fsdp2"
        )


def _in_place(params: Sequence[Tensor], layers: Sequence[Tensor]) -> Tensor:
    """The only one of ``params``, this process's partition, moved to the memory of the layers that it is a copy of."""
    storage, (partition, *others) = layers[0].untyped_storage(), params
    size = partition.numel()
    good = not others and all(p.untyped_storage().data_ptr() == storage.data_ptr() for p in layers)
    good &= storage.nbytes() == dist.get_world_size() * partition.nbytes
    weights = layers[0].detach().as_strided((size,), (1,), dist.get_rank() * size) if good else partition[:0]
    _require(torch.equal(weights, partition), "it lays out its partitions in another way")
    partition.data = weights
    return partition


def _has_shape(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _gather(value: Any) -> Any:
    """The partitions of all processes one after the other, on rank 0's CPU; what is no tensor of one as it is."""
    if not _has_shape(value):
        return value
    rows = [torch.empty_like(value) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(value, rows)
    return torch.cat(rows).cpu() if rows else value


def _of_layer(state: State, p: Tensor) -> State:
    """What a state of flat tensors holds for the layer p, in memory of its own."""
    place = slice(p.storage_offset(), p.storage_offset() + p.numel())
    whole = {key: value[place].view(p.shape) if _has_shape(value) else value for key, value in state.items()}
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in whole.items()}
