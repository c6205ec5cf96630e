"""Gradients whose rows, or parts of whose vectors, lie on several processes are clipped as whole ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbatch.clip import Kind, clip_held
from ranks import run_ranks

WORLD = 3
SHAPES = ((4, 3, 3, 3), (7,), (1,), (5, 4), (2, 3), (1, 7))
CASES: tuple[tuple[Kind, float | None], ...] = (("none", None), ("norm", 0.5), ("value", 0.3), ("adaptive", 0.02))
DTYPES = (torch.float32, torch.float64, torch.float16)


def whole(dtype: torch.dtype, bad: float | None) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [
        (torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator).to(dtype))
        for shape in SHAPES
    ]
    made[1] = (made[1][0] * 0, made[1][1])
    if bad is not None:
        made[3][1][4, 1] = bad
    return made


def clipped(rank: int) -> list[Any]:
    """The norm and this rank's rows of what is left of the gradients, and the number of sums, case by case."""
    found = []
    for dtype in DTYPES:
        for kind, limit in CASES:
            for bad in (None, float("inf")):
                sums: list[int] = []

                def sum_parts(tensor: Tensor, sums: list[int] = sums) -> None:
                    sums.append(len(tensor))
                    torch.distributed.all_reduce(tensor)

                held = [tuple(_rows(t, rank) for t in pair) for pair in whole(dtype, bad)]
                norm = clip_held(held, kind=kind, max=limit, sum_parts=sum_parts)
                found.append((norm, [gradient for _, gradient in held], sums))
    return found


def _rows(tensor: Tensor, rank: int) -> Tensor:
    chunks = tensor.chunk(WORLD)
    return chunks[rank].clone() if rank < len(chunks) else tensor[:0].clone()


def test_parts_are_clipped_as_the_whole() -> None:
    found = run_ranks(WORLD, clipped)
    cases = [(dtype, kind, limit, bad) for dtype in DTYPES for kind, limit in CASES for bad in (None, float("inf"))]
    for case, parts in zip(cases, zip(*found, strict=True), strict=True):
        dtype, kind, limit, bad = case
        held = whole(dtype, bad)
        norm = clip_held(held, kind=kind, max=limit)
        together = [torch.cat(rows) for rows in zip(*(gradients for _, gradients, _ in parts), strict=True)]
        tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
        for ours, _, sums in parts:
            torch.testing.assert_close(ours, norm, rtol=tolerance, atol=0)
            # One small sum: of the norm's square, and of two squares for each vector where they are units.
            assert sums == [1 + 2 * 2 * (kind == "adaptive")], case
        torch.testing.assert_close(together, [g for _, g in held], rtol=tolerance, atol=0, equal_nan=True)


def test_squares_of_norms_that_float32_holds_are_not_lost() -> None:
    for size in (1.5e19, 1e-18):
        gradient = torch.tensor([size])
        norm = clip_held([(gradient, gradient)], kind="none", max=None, sum_parts=lambda squares: squares.mul_(4))
        torch.testing.assert_close(norm, torch.tensor(2 * size), rtol=1e-6, atol=0)
