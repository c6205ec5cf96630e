"""Are all processes still in the same run?"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict

import torch
from torch import Tensor

from .state import Clock, Parts, RunError


def check_ranks(parts: Parts, clock: Clock, tensors: dict[str, Tensor]) -> None:
    """Compare these tensors, the plan and the clock over all processes, bit by bit, in one small collective.

    Raises RunError on every process where they are not equal; it names the ranks in the minority and what they have
    that differs. Each tensor is hashed where it lies, by the sum of its bits read as integers, modulo 2⁶⁴.
    """
    runtime = parts.runtime
    if runtime.world_size == 1:
        return
    said = {"the plan": parts.plan.to_json(), "the clock": repr(asdict(clock))}
    words = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") for text in said.values()]
    sums = [bits(tensor).sum(dtype=torch.int64) for tensor in tensors.values()]
    mine = torch.cat([torch.tensor(words, device=runtime.device), torch.stack(sums)])
    rows = [tuple(row) for row in runtime.gather(mine).tolist()]
    common, _ = Counter(rows).most_common(1)[0]
    odd = [rank for rank, row in enumerate(rows) if row != common]
    if not odd:
        return
    names = [*said, *tensors]
    wrong = [name for name, ours, theirs in zip(names, rows[odd[0]], common, strict=True) if ours != theirs]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise RunError(
        f"step {clock.step}: rank {', '.join(map(str, odd))} of {runtime.world_size} differs from the others in "
        f"{wrong[0]}{more}; stopped before a checkpoint, and the same command goes on from the newest one"
    )


def bits(tensor: Tensor) -> Tensor:
    """The same memory read as integers of the same width."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(integers[tensor.element_size()])
