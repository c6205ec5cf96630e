"""Are all processes still in the same run?"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bigbatch.keyed import hashed

from .state import Clock, Parts, RunError

_AT_A_TIME = 2**22


def check_ranks(parts: Parts, clock: Clock, tensors: Mapping[str, Tensor]) -> None:
    """Compare these tensors, the plan, the clock and what the data is over all processes, in one small collective.

    Tensors are compared bit by bit. Raises RunError on every process where they are not equal; it names the ranks in
    the minority and what they have that differs. Of a tensor only a hash of its bits travels. What is each process's
    own is left out: such buffers, and parts of a sharded parameter.
    """
    runtime = parts.runtime
    if runtime.world_size == 1:
        return
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in parts.own_buffers and not isinstance(tensor, DTensor)
    }
    said = {"the plan": parts.plan.digest, "the clock": repr(asdict(clock)), "the data": parts.loader.dataset.digest}
    words = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") for text in said.values()]
    hashes = [fingerprints(tensor.reshape(1, -1)) for tensor in tensors.values()]
    rows = runtime.gather(torch.cat([torch.tensor(words, device=runtime.device), *hashes])).tolist()
    common, _ = Counter(map(tuple, rows)).most_common(1)[0]
    odd = [rank for rank, row in enumerate(rows) if tuple(row) != common]
    if not odd:
        return
    names = [*said, *tensors]
    wrong = [name for name, ours, theirs in zip(names, rows[odd[0]], common, strict=True) if ours != theirs]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise RunError(
        f"step {clock.step}: rank {', '.join(map(str, odd))} of {runtime.world_size} differs from the others in "
        f"{wrong[0]}{more}; stopped before a checkpoint was written, older ones are untouched"
    )


def fingerprints(tensor: Tensor) -> Tensor:
    """Of each row of (rows, values): a hash of its bits and their places, int64 (rows,)."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().view(integers[tensor.element_size()])
    total = torch.zeros(len(bits), dtype=torch.int64, device=bits.device)
    width = max(1, _AT_A_TIME // max(1, len(bits)))
    for start in range(0, bits.shape[1], width):
        part = bits[:, start : start + width].long()
        place = torch.arange(start, start + part.shape[1], device=bits.device)
        # Up to 32 bits, place and value are one key, which takes half as long to hash as two.
        keys = (place, part) if tensor.element_size() == 8 else ((place << 32) + part,)
        total += hashed(*keys).sum(1)
    return total
