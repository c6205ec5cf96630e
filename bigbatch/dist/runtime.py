"""Processes, devices and precision; Hugging Face Accelerate underneath."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from bigbatch.config import say
from bigbatch.config.models import Parallel

from .deepspeed import Zero0, Zero12, deepspeed_accelerator, forget_launcher, stage_of
from .fsdp2 import FullySharded
from .heartbeat import Heartbeat, Progress
from .local import portable
from .strategy import Build, Replicas, Strategy
from .zero1 import Zero1

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Runtime:
    """One process of a run: who it is, where it computes, and how it sums with the others.

    As a context manager it beats: see `Heartbeat`. ``progress`` is where the process says what it does.

    Only the model is given to Accelerate, and for DeepSpeed the optimiser; schedule, step, sampler and accumulation are
    bigbatch's own, since Accelerate's step the schedule once per process and average micro batches of unequal size.
    Raises ValueError where a launcher has set up something else than data-parallel processes, or another number of them
    than it asked for, and where DeepSpeed is not installed.
    """

    def __init__(self, *, precision: Precision = "fp32", parallel: Parallel | None = None, debug: bool = False) -> None:
        self.parallel = parallel = parallel or Parallel()
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        zero = parallel.strategy == "deepspeed" and asked > 1
        if parallel.strategy == "deepspeed":
            forget_launcher()
        with _meeting(parallel, asked):
            self._accelerator = deepspeed_accelerator(parallel) if zero else _accelerator(parallel)
        self.precision = precision
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        self.progress = Progress(self.device)
        self.heartbeat = Heartbeat(self.progress, rank=self.rank, world_size=self.world_size, parallel=parallel)
        if asked != self.world_size:
            raise ValueError(
                f"WORLD_SIZE = {asked}: so many processes were asked for and {self.world_size} run; start with torchrun"
            )
        kind = self._accelerator.distributed_type
        if kind not in ((DistributedType.DEEPSPEED,) if zero else REPLICATED):
            raise ValueError(
                f"parallel.strategy = {parallel.strategy}: the launcher is configured for {kind.value}; use a "
                "configuration without it"
            )
        if debug:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
            torch.autograd.set_detect_anomaly(True)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of parameters and inputs; bf16 and fp16 keep both in float32 and cast inside the forward pass."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision not in HALF:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=HALF[self.precision])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Where one process fails in the block, all raise its error at its end, and none waits for one that has left.

        A collective; the block has none.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            error = own
        # One that cannot be sent may not keep the others waiting.
        if found := [each for each in self.collect(error and (portable(error) or RuntimeError(str(error)))) if each]:
            raise error or found[0]

    @contextlib.contextmanager
    def first_on_this_machine(self) -> Iterator[None]:
        """One process of each machine runs the block before its others do, which find what it left (a download).
        `together`, so that the others do not even begin where one of the first has failed."""
        first = self._accelerator.is_local_main_process
        if not first:
            with self.together():
                pass
        with self.together():
            yield
        if first:
            with self.together():
                pass

    def prepare(self, model: nn.Module, build: Build) -> Strategy:
        """Model and optimiser under ``parallel.strategy``; ``build`` makes the optimiser of the model it is given.

        One process holds everything, whatever the strategy.
        """
        strategy = self.parallel.strategy if self.world_size > 1 else "ddp"
        if strategy == "zero1":
            return Zero1(model, build(model), wrap=self._replicate, parallel=self.parallel)
        if strategy == "fsdp2":
            rounds_to = HALF.get(self.parallel.compression)
            return FullySharded(model, build, sum_parts=self.sum, device=self.device, rounds_to=rounds_to)
        if strategy == "deepspeed":
            stage, prepare = stage_of(self.parallel), self._accelerator.prepare
            if stage == 0:
                return Zero0(model, build(model), prepare=prepare, stage=stage)
            return Zero12(model, build(model), prepare=prepare, stage=stage, sum_parts=self.sum)
        return Replicas(model, build(model), wrap=self._replicate, parallel=self.parallel)

    def _replicate(self, model: nn.Module) -> nn.Module:
        """The model under DistributedDataParallel, or as it is on one process."""
        if self.world_size == 1:
            return model.to(self.device)
        with warnings.catch_warnings():
            # torch renames `broadcast_buffers`; the old name is the one that all supported releases know.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return self._accelerator.prepare_model(model)  # type: ignore[no-any-return]

    def seed(self, number: int) -> None:
        """Seed torch's generators of this process's devices, 0 ≤ number < 2⁶⁴.

        torch.manual_seed also asks for devices that are not there, which takes longer than a small training step.
        """
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        with self.progress.waiting():
            self.start_sum(tensor)()

    def start_sum(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum a tensor over all processes, in place; what is returned waits for the sum."""
        if self.world_size == 1:
            return lambda: None
        work = dist.all_reduce(tensor, async_op=True)
        return work.wait

    def gather(self, tensor: Tensor) -> Tensor:
        """Every process's tensor, (world size, *shape), by rank."""
        rows = [torch.empty_like(tensor) for _ in range(self.world_size)]
        if self.world_size > 1:
            with self.progress.waiting():
                dist.all_gather(rows, tensor)
        else:
            rows = [tensor]
        return torch.stack(rows)

    def neighbours(self, count: int) -> Callable[[Tensor], None]:
        """A function that sums a tensor in place over this process's block of ``count`` neighbouring ranks.

        Every process must call it, with the same count, which must divide the world size.
        """
        mine: dist.ProcessGroup | None = None
        for first in range(0, self.world_size, count):
            block = list(range(first, first + count))
            with _meeting(self.parallel, self.world_size):
                group = dist.new_group(block)
            if self.rank in block:
                mine = cast(dist.ProcessGroup, group)  # only outsiders of a group get something else

        def reduce(tensor: Tensor) -> None:
            dist.all_reduce(tensor, group=mine)

        return reduce

    def collect(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            with self.progress.waiting():
                dist.all_gather_object(values, value)
        return values

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        with self.progress.waiting():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def __enter__(self) -> Runtime:
        self.heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.heartbeat.stop()
        # After an error the other processes may be inside a collective, and leaving in order would wait for them.
        if kind is None and dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _meeting(parallel: Parallel, processes: int) -> Iterator[None]:
    """While gloo connects processes torch's timeout does not always hold: where one dies just then, others would wait
    for ever. This one ends at twice the timeout."""

    def give_up() -> None:
        say(
            f"rank {os.environ.get('RANK', '0')}: {processes} processes have not found each other in twice "
            f"parallel.timeout = {parallel.timeout:g} s: did one of them die while they met?"
        )
        os._exit(1)

    timer = threading.Timer(2 * parallel.timeout, give_up)
    timer.daemon = True
    if processes > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def lost_contact(error: Exception) -> bool:
    """Whether a collective has failed because another process is gone or does not answer."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _accelerator(parallel: Parallel) -> Accelerator:
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        # Autocast is ours (`Runtime.autocast`), whatever a launcher's configuration says.
        mixed_precision="no",
        kwargs_handlers=[
            # Batch norm's running statistics are merged, not copied from rank 0.
            DistributedDataParallelKwargs(
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                # Where gloo runs the collectives of two buckets, PowerSGD's mix them up between processes.
                bucket_cap_mb=2**20 if parallel.compression == "powersgd" and not torch.cuda.is_available() else 25,
            ),
            InitProcessGroupKwargs(timeout=timedelta(seconds=parallel.timeout)),
        ],
    )
