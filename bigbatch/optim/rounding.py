"""Stochastic rounding to bfloat16 and float16, with random numbers by key."""

from __future__ import annotations

import torch
from torch import Tensor

from bigbatch.keyed import uniform

_ROWS_OF = 1 << 20  # elements rounded at a time: the draws take several times their memory


def round_stochastically(x: Tensor, out: Tensor, *, place: int, step: Tensor) -> None:
    """Round float32 x to one of the two neighbours in out's dtype, with the probability that makes the mean x.

    As in Zamirai et al. 2020 (arXiv:2010.06192, section 3). ``out`` receives the result and has x's shape. Numbers that
    out's dtype has, and what is beyond its range or not finite, are rounded as ever. The draw of an element belongs to
    (``place``, ``step``, the element's index in the whole parameter), so that replicas and resumed runs round alike.
    ``out`` may be a DTensor; x is then its local part. ``step`` is a 0-dim tensor.
    """
    offsets, sizes = [0] * x.ndim, list(out.shape)
    if hasattr(out, "to_local") and x.numel():
        (chunk,) = out.__create_chunk_list__()  # type: ignore[attr-defined]
        offsets, out = list(chunk.offsets), out.to_local()
    if not x.ndim:
        x, out, offsets, sizes = x.view(1), out.view(1), [0], [1]
    rows = max(1, _ROWS_OF * x.shape[0] // max(1, x.numel()))
    for at in range(0, x.shape[0] if x.numel() else 0, rows):
        part = x[at : at + rows]
        index = _index(part.shape, [offsets[0] + at, *offsets[1:]], sizes, part.device)
        out[at : at + rows] = _rounded(part, out.dtype, uniform(place, step.long(), index, draw=0))


def _rounded(x: Tensor, dtype: torch.dtype, u: Tensor) -> Tensor:
    nearest = x.to(dtype)
    error = x - nearest.float()
    other = torch.nextafter(nearest, torch.full_like(nearest, torch.inf).copysign(error.to(dtype)))
    chance = error / (other.float() - nearest.float())  # not finite, or 0, where the other neighbour is not finite
    return torch.where(u < chance, other, nearest)


def _index(shape: torch.Size, offsets: list[int], sizes: list[int], device: torch.device) -> Tensor:
    """Row-major index, in a tensor of the given sizes, of each element of the block at the offsets; int64."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for extent, offset, size in zip(shape, offsets, sizes, strict=True):
        index = index.unsqueeze(-1) * size + torch.arange(offset, offset + extent, device=device)
    return index
