"""The steps of LARS and LAMB as Triton kernels: one launch goes over all tensors of a bucket, chunk by chunk.

A kernel finds its chunk in a table of sizes and addresses (:class:`Table`). Squares are summed in a fixed order, within
a chunk in the weights' dtype and over chunks in float64, so that a run repeats itself; there are no atomics.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shards import ROWS
from .trust import Tensors

CHUNK = 4096  # elements that a program updates; a power of 2
COLUMNS = tl.constexpr(6)  # of the table: a tensor's size and first chunk, the addresses of w, g and up to two moments
SIZE, FIRST, W, G, M, V = (tl.constexpr(column) for column in range(COLUMNS.value))
KINDS = tl.constexpr(ROWS)  # of squares, for each of which a chunk has a place
WIDTH = tl.constexpr(256)  # sums of chunks that are added at a time
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Table:
    """N weights with their gradients and moments, as the kernels see them; ``ways`` are the lists of N of each.

    It serves until a size or an address changes; until then a step uploads nothing. A CUDA graph replays the addresses
    it was captured with: keep the gradients in place, and take no step outside it with others.
    """

    def __init__(self, ways: Sequence[Tensors]) -> None:
        self.key = self.made_of(ways)
        w, (sizes, *addresses) = ways[0], self.key
        size = torch.tensor(sizes)
        chunks = (size + CHUNK - 1) // CHUNK
        first = chunks.cumsum(0) - chunks
        rows = torch.zeros(len(w), COLUMNS.value, dtype=torch.int64)
        rows[:, : 2 + len(addresses)] = torch.stack([size, first, *map(torch.tensor, addresses)], 1)
        owners = torch.repeat_interleave(torch.arange(len(w), dtype=torch.int32), chunks)
        self.rows, self.owners = rows.to(w[0].device), owners.to(w[0].device)
        self.partials = torch.empty(len(owners), ROWS, dtype=torch.float64, device=w[0].device)
        self.ones = torch.ones(len(w), dtype=torch.float64, device=w[0].device)
        self.dtype = DTYPES[w[0].dtype]

    @staticmethod
    def made_of(ways: Sequence[Tensors]) -> tuple[tuple[int, ...], ...]:
        """What a table says: the sizes of the weights, and each list's addresses."""
        return tuple(w.numel() for w in ways[0]), *(tuple(t.data_ptr() for t in way) for way in ways)

    def launch(self, kernel: Any, *args: Tensor | float, **switches: bool) -> None:
        """Run a kernel over all chunks."""
        with self._device():
            kernel[(len(self.owners),)](
                self.owners, self.rows, *args, DTYPE=self.dtype, CHUNK=CHUNK, num_warps=8, **switches
            )

    def squares(self, kernel: Any, kinds: int, *args: Tensor | float, **switches: bool) -> Tensor:
        """Run a kernel that leaves ``kinds`` squares of each chunk; their sums by tensor, float64, shape (kinds, N)."""
        self.launch(kernel, self.partials, *args, **switches)
        sums = torch.empty(kinds, len(self.rows), dtype=torch.float64, device=self.rows.device)
        with self._device():
            _sum[(len(self.rows), kinds)](self.rows, self.partials, sums, CHUNK=CHUNK)
        return sums

    def _device(self) -> torch.cuda.device:
        return torch.cuda.device(self.rows.get_device())  # Triton launches on the current one; −1, the CPU's, is none


@triton.jit
def _chunk(owners, rows, CHUNK: tl.constexpr):
    """The number of this program's tensor, its row, the offsets of the chunk in it, and which of those are inside."""
    owner = tl.load(owners + tl.program_id(0)).to(tl.int64)
    row = rows + COLUMNS * owner
    at = (tl.program_id(0) - tl.load(row + FIRST)) * CHUNK + tl.arange(0, CHUNK)
    return owner, row, at, at < tl.load(row + SIZE)


@triton.jit
def _load(row, column: tl.constexpr, at, inside, DTYPE: tl.constexpr):
    return tl.load(tl.load(row + column).to(tl.pointer_type(DTYPE)) + at, mask=inside, other=0.0)


@triton.jit
def _store(row, column: tl.constexpr, at, inside, value, DTYPE: tl.constexpr):
    tl.store(tl.load(row + column).to(tl.pointer_type(DTYPE)) + at, value, mask=inside)


@triton.jit
def _store_square(partials, kind: tl.constexpr, x):
    tl.store(partials + KINDS * tl.program_id(0) + kind, tl.sum(x * x).to(tl.float64))


@triton.jit
def _sum(rows, partials, sums, CHUNK: tl.constexpr):
    row, kind = rows + COLUMNS * tl.program_id(0), tl.program_id(1)
    first, chunks = tl.load(row + FIRST), tl.cdiv(tl.load(row + SIZE), CHUNK)
    total = tl.zeros((WIDTH,), tl.float64)
    for start in range(0, chunks, WIDTH):
        at = start + tl.arange(0, WIDTH)
        total += tl.load(partials + KINDS * (first + at) + kind, mask=at < chunks, other=0.0)
    tl.store(sums + kind * tl.num_programs(0) + tl.program_id(0), tl.sum(total))


@triton.jit
def lars_squares(
    owners, rows, partials, weight_decay: tl.float64, DTYPE: tl.constexpr, CHUNK: tl.constexpr, JOINT: tl.constexpr
):
    """‖w‖², ‖g‖² and, if JOINT, ‖g + βw‖² of each chunk."""
    _, row, at, inside = _chunk(owners, rows, CHUNK)
    w = _load(row, W, at, inside, DTYPE)
    g = _load(row, G, at, inside, DTYPE)
    _store_square(partials, 0, w)
    _store_square(partials, 1, g)
    if JOINT:
        _store_square(partials, 2, g + tl.full((), weight_decay, DTYPE) * w)


@triton.jit
def lars_step(
    owners, rows, inner, outer, momentum: tl.float64, weight_decay: tl.float64, DTYPE: tl.constexpr,
    CHUNK: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """v ← m v + a, a = inner·(g + βw); w ← w − outer·v, or with Nesterov's look ahead w − outer·(a + m v)."""
    owner, row, at, inside = _chunk(owners, rows, CHUNK)
    w = _load(row, W, at, inside, DTYPE)
    g = _load(row, G, at, inside, DTYPE)
    step = tl.load(inner + owner).to(DTYPE) * (g + tl.full((), weight_decay, DTYPE) * w)
    if MOMENTUM:
        m = tl.full((), momentum, DTYPE)
        v = m * _load(row, M, at, inside, DTYPE) + step
        _store(row, M, at, inside, v, DTYPE)
        step = step + m * v if NESTEROV else v
    _store(row, W, at, inside, w - tl.load(outer + owner).to(DTYPE) * step, DTYPE)


@triton.jit
def _lamb_update(w, m, v, owner, inside, c1, c2, eps, weight_decay, DTYPE: tl.constexpr):
    """u = m̂ / (√v̂ + ε) + λw, m̂ = m / c₁, v̂ = v / c₂; 0 beyond the tensor, for any ε."""
    root = tl.sqrt(v / tl.load(c2 + owner)) + tl.full((), eps, DTYPE)
    return m / (tl.load(c1 + owner) * tl.where(inside, root, 1.0)) + tl.full((), weight_decay, DTYPE) * w


@triton.jit
def lamb_moments(
    owners, rows, partials, rates, divisor, beta1: tl.float64, beta2: tl.float64, c1, c2, eps: tl.float64,
    weight_decay: tl.float64, DTYPE: tl.constexpr, CHUNK: tl.constexpr, ADAPT: tl.constexpr,
):  # fmt: skip
    """m and v by g/divisor, then ‖w‖² and ‖u‖² of each chunk, or unless ADAPT w ← w − rate·u."""
    owner, row, at, inside = _chunk(owners, rows, CHUNK)
    w = _load(row, W, at, inside, DTYPE)
    g = _load(row, G, at, inside, DTYPE) / tl.load(divisor).to(DTYPE)
    m = _load(row, M, at, inside, DTYPE)
    v = _load(row, V, at, inside, DTYPE)
    m += tl.full((), 1 - beta1, DTYPE) * (g - m)
    v = tl.full((), beta2, DTYPE) * v + tl.full((), 1 - beta2, DTYPE) * g * g
    _store(row, M, at, inside, m, DTYPE)
    _store(row, V, at, inside, v, DTYPE)
    u = _lamb_update(w, m, v, owner, inside, c1, c2, eps, weight_decay, DTYPE)
    if ADAPT:
        _store_square(partials, 0, w)
        _store_square(partials, 1, u)
    else:
        _store(row, W, at, inside, w - tl.load(rates + owner).to(DTYPE) * u, DTYPE)


@triton.jit
def lamb_descent(
    owners, rows, rates, c1, c2, eps: tl.float64, weight_decay: tl.float64, DTYPE: tl.constexpr, CHUNK: tl.constexpr
):
    """w ← w − rate·u. To make u anew from m and v moves as many bytes as to write and read it, and needs no scratch."""
    owner, row, at, inside = _chunk(owners, rows, CHUNK)
    w = _load(row, W, at, inside, DTYPE)
    m = _load(row, M, at, inside, DTYPE)
    v = _load(row, V, at, inside, DTYPE)
    u = _lamb_update(w, m, v, owner, inside, c1, c2, eps, weight_decay, DTYPE)
    _store(row, W, at, inside, w - tl.load(rates + owner).to(DTYPE) * u, DTYPE)


DEVICE = "cuda" if isinstance(_sum, triton.JITFunction) else "cpu"
"""Where the kernels run: with TRITON_INTERPRET=1 in the environment, in Triton's interpreter on the CPU."""
