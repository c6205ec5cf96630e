"""How DistributedDataParallel's gradients travel: torch's communication hooks, behind probes that only look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future

from bigbatch.config.models import Parallel

Probe = Callable[[GradBucket], None]


def exchange_with(
    wrapped: nn.parallel.DistributedDataParallel, parallel: Parallel, probes: Sequence[Probe]
) -> PowerSGDState | None:
    """From now on gradients travel as ``parallel.compression`` says, once each of ``probes`` has seen them.

    A probe is given each bucket of this process's own gradient, accumulated and not yet exchanged, and must leave it as
    it is. Whatever the compression, the exchange divides the sum over processes by their number. Once per model.
    Returns what PowerSGD remembers from step to step.
    """
    state, exchange = _exchange(wrapped, parallel)

    def hook(state: Any, bucket: GradBucket) -> Future[Tensor]:
        for probe in probes:
            probe(bucket)
        return exchange(state, bucket)

    hook.__annotations__.clear()  # torch compares them with classes, and these are strings
    wrapped.register_comm_hook(state, hook)
    return state if isinstance(state, PowerSGDState) else None


def _exchange(
    wrapped: nn.parallel.DistributedDataParallel, parallel: Parallel
) -> tuple[Any, Callable[[Any, GradBucket], Future[Tensor]]]:
    group = wrapped.process_group
    if parallel.compression == "powersgd":
        # Two steps are exchanged in full before; the buckets must be final by then.
        return PowerSGDState(group, parallel.powersgd_rank, start_powerSGD_iter=2), powerSGD_hook
    hooks = {
        "none": default_hooks.allreduce_hook,
        "bf16": default_hooks.bf16_compress_hook,
        "fp16": default_hooks.fp16_compress_hook,
    }
    return group, hooks[parallel.compression]
