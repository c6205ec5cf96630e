"""Clipping equals torch's and timm's, and the textbook."""

from __future__ import annotations

import math

import pytest
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from bigbatch.clip import clip_gradients
from reference import clip as reference

torch.set_num_threads(1)
SHAPES = ((4, 3, 3, 3), (4,), (), (5, 4), (0, 3), (1, 7))
KINDS = ("norm", "value", "adaptive")


def parameters(scale: float = 1.0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Weights of several sizes, one of them zero, with gradients; and one without a gradient."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, shape in enumerate(SHAPES):
        p = nn.Parameter(0.1 * i * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        p.grad = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        made.append(p)
    made[0].grad = made[0].grad.to(memory_format=torch.channels_last)
    return [*made, nn.Parameter(torch.ones(3, dtype=dtype))]


def gradients(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad.clone() for p in params if p.grad is not None]


def close(ours, theirs, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("limit", [0.01, 0.5, 3.0, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_textbook(kind: str, limit: float) -> None:
    ours = parameters()
    before, held = gradients(ours), [p.grad for p in ours]
    weights = [p.detach().clone() for p in ours[:-1]]
    expected = {
        "norm": lambda: reference.by_norm(before, limit),
        "value": lambda: reference.by_value(before, limit),
        "adaptive": lambda: reference.adaptive(weights, before, limit),
    }[kind]()
    norm = clip_gradients(iter(ours), kind=kind, max=limit)
    close(norm, reference.global_norm(before))
    close(gradients(ours), expected)
    assert all(p.grad is g for p, g in zip(ours, held, strict=True))
    close([p.detach() for p in ours[:-1]], weights, 0)


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_norm_equals_torchs(limit: float) -> None:
    ours, theirs = parameters(), parameters()
    close(clip_gradients(ours, kind="norm", max=limit), nn.utils.clip_grad_norm_(theirs, limit))
    close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("limit", [1e-3, 0.01, 0.5])
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_adaptive_equals_timms(limit: float, scale: float) -> None:
    ours, theirs = parameters(scale), parameters(scale)
    clip_gradients(ours, kind="adaptive", max=limit)
    adaptive_clip_grad(theirs, clip_factor=limit)
    close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_limit_changes_no_bit(kind: str) -> None:
    ours = parameters()
    before = gradients(ours)
    clip_gradients(ours, kind=kind, max=1e30)
    close(gradients(ours), before, 0)


def test_none_only_measures() -> None:
    ours = parameters()
    before = gradients(ours)
    close(clip_gradients(ours, kind="none", max=None), reference.global_norm(before))
    close(gradients(ours), before, 0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("kind", ["norm", "adaptive"])
def test_gradients_that_are_not_finite_are_left_as_they_are(kind: str, bad: float) -> None:
    ours = parameters()
    with torch.no_grad():
        ours[3].grad[2, 1] = bad
    before = gradients(ours)
    assert not clip_gradients(ours, kind=kind, max=0.1).isfinite()
    torch.testing.assert_close(gradients(ours), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_measured_in_float32(kind: str, dtype: torch.dtype) -> None:
    """Norms that float16 cannot hold; mixed with float32 and float64."""
    ours = parameters(1e4, dtype)
    exact = [p.double() for p in ours[:-1]]
    before = [g.double() for g in gradients(ours)]
    norm = clip_gradients(ours, kind=kind, max=0.5)
    assert norm.dtype == torch.float32
    close(norm.double(), reference.global_norm(before), 1e-5)
    expected = {
        "norm": lambda: reference.by_norm(before, 0.5),
        "value": lambda: reference.by_value(before, 0.5),
        "adaptive": lambda: reference.adaptive(exact, before, 0.5),
    }[kind]()
    assert all(g.dtype == dtype for g in gradients(ours))
    close([g.double() for g in gradients(ours)], expected, {torch.float32: 1e-5}.get(dtype, 1e-2))


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_dtypes(kind: str) -> None:
    ours, apart = parameters()[:2] + parameters(dtype=torch.float16)[2:4], parameters()[:4]
    for a, b in zip(apart, ours, strict=True):
        a.data, a.grad = b.detach().double().clone(), b.grad.double().clone()
    norm = clip_gradients(ours, kind=kind, max=0.3)
    assert norm.dtype == torch.float64
    close(norm, clip_gradients(apart, kind=kind, max=0.3), 1e-6)
    close([g.double() for g in gradients(ours)], gradients(apart), 1e-3)


def test_nothing_to_clip() -> None:
    assert float(clip_gradients([nn.Parameter(torch.ones(2))], kind="norm", max=1.0)) == 0
    zero = nn.Parameter(torch.ones(2, 2))
    zero.grad = torch.zeros(2, 2)
    for kind in KINDS:
        assert float(clip_gradients([zero], kind=kind, max=1.0)) == 0
    assert not zero.grad.any()


@pytest.mark.parametrize(("kind", "limit"), [*((kind, None) for kind in KINDS), ("none", 1.0)])
def test_a_limit_that_is_missing_or_ignored_is_refused(kind: str, limit: float | None) -> None:
    with pytest.raises(ValueError, match=rf"clip\.max = {limit}: with clip\.kind {kind}"):
        clip_gradients(parameters(), kind=kind, max=limit)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_two_devices_without_waiting(kind: str) -> None:
    ours, expected = parameters(), parameters()
    for p in ours[:3]:
        p.grad, p.data = None, p.data.cuda()
        p.grad = torch.ones_like(p)
    for p in expected[:3]:
        p.grad = torch.ones_like(p)
    norm = clip_gradients(ours, kind=kind, max=0.5)
    close(norm.cpu(), clip_gradients(expected, kind=kind, max=0.5))
    close([g.cpu() for g in gradients(ours)], gradients(expected))
    resident = [p.cuda().detach().requires_grad_() for p in ours]
    for p in resident:
        p.grad = torch.ones_like(p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        clip_gradients(resident, kind=kind, max=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_the_norm_of_many_elements_keeps_its_digits(format: torch.memory_format) -> None:
    """One float32 norm over all of them, as torch's on the CPU, is off by more."""
    p = nn.Parameter(torch.zeros(64, 64, 32, 32))
    p.grad = torch.rand(p.shape, generator=torch.Generator().manual_seed(0)).to(memory_format=format)
    exact = float(p.grad.double().norm())
    assert abs(float(clip_gradients([p], kind="none", max=None)) / exact - 1) < 1e-5
