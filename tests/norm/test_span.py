"""SpanBatchNorm on one process: equal to nn.BatchNorm for one group, to the textbook's chunks for many."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bigbatch.norm import BatchStats, SpanBatchNorm
from reference.batch_norm import batch_norm

torch.set_num_threads(1)
SHAPES = {"1d": (7,), "1d_sequence": (7, 5), "2d": (7, 3, 4), "2d_small": (7, 1, 2), "3d": (7, 2, 3, 2)}
TORCH = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(channels: int, span: int, **options) -> SpanBatchNorm:
    norm = SpanBatchNorm(channels, span=span, **options).double()
    if norm.affine:
        norm.load_state_dict(
            {"weight": 1 + random(channels, seed=1) / 4, "bias": random(channels, seed=2)}, strict=False
        )
    return norm


def run(function, x: torch.Tensor, dy: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of x and of the parameters."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *parameters), dy)]


def close(ours, theirs, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_group_is_torchs_batch_norm(shape: tuple[int, ...], affine: bool) -> None:
    channels, *rest = shape
    ours = layer(channels, 64, affine=affine, momentum=0.3)
    theirs = TORCH[len(rest)](channels, momentum=0.3, affine=affine).double()
    theirs.load_state_dict(ours.state_dict())
    stats = BatchStats(ours)
    for step in range(20):
        x, dy = random(9, *shape, seed=step) * 3 + 5, random(9, *shape, seed=100 + step)
        close(run(ours, x, dy, *ours.parameters()), run(theirs, x, dy, *theirs.parameters()))
        stats.commit(9)
    close(ours.state_dict(), theirs.state_dict())
    assert int(ours.num_batches_tracked) == 20
    close(ours.eval()(x), theirs.eval()(x))


@given(
    n=st.integers(2, 40),
    span=st.integers(2, 16),
    channels=st.integers(1, 5),
    rest=st.sampled_from([(), (3,), (17,), (2, 3), (4, 4), (1, 1), (2, 1, 3), (2, 3, 3)]),
)
def test_ghosts_equal_the_textbook(n: int, span: int, channels: int, rest: tuple[int, ...]) -> None:
    ours = layer(channels, span)
    x, dy = random(n, channels, *rest, seed=n), random(n, channels, *rest, seed=n + 1)

    def textbook(x: torch.Tensor) -> torch.Tensor:
        nonlocal mean, var
        y, mean, var = batch_norm(x, ours.weight, ours.bias, span=span, eps=ours.eps)
        return y

    mean = var = torch.zeros(0)
    theirs = run(textbook, x, dy, *ours.parameters())
    close(run(ours, x, dy, *ours.parameters()), theirs, 1e-9)
    assert ours.seen == n
    close((ours.pending_mean, ours.pending_var), (mean.detach(), var.detach()))


@pytest.mark.parametrize("n", [12, 13, 6, 3])
@pytest.mark.parametrize("rest", [(), (5,), (2, 3), (2, 3, 2)])
def test_ghosts_by_copy_equal_the_textbook(n: int, rest: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does with channels-last or flat inputs, where a loop over groups would be many launches."""
    ours = layer(3, 3)
    x, dy = random(n, 3, *rest), random(n, 3, *rest, seed=1)
    whole = n - n % 3
    function = lambda x: ours._ghosts_by_copy(x[:whole], groups=whole // 3)  # noqa: E731
    theirs = lambda x: batch_norm(x[:whole], ours.weight, ours.bias, span=3, eps=ours.eps)[0]  # noqa: E731
    close(run(function, x, dy[:whole], *ours.parameters()), run(theirs, x, dy[:whole], *ours.parameters()))
    assert ours.seen == whole


@pytest.mark.parametrize("span", [2, 4, 8, 64], ids=lambda span: f"span{span}")
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((8, 3, 4, 5), torch.channels_last),
        ((8, 3, 2, 4, 5), torch.channels_last_3d),
        ((8, 3, 4, 5), torch.contiguous_format),
    ],
)
def test_memory_format_is_kept(span: int, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    ours, plain = layer(3, span), layer(3, span)
    x, dy = random(*shape), random(*shape, seed=1)
    expected = run(plain, x, dy, *plain.parameters())
    x, dy = x.to(memory_format=memory_format), dy.to(memory_format=memory_format)
    results = run(ours, x, dy, *ours.parameters())
    close(results, expected)
    assert all(t.is_contiguous(memory_format=memory_format) for t in results[:2])
    if span == 2:
        by_copy = ours._ghosts_by_copy(x, groups=4)
        close(by_copy, expected[0])
        # On a contiguous input the copy comes back channels last; only other formats take this way.
        assert memory_format is torch.contiguous_format or by_copy.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_gradients_of_another_layout(memory_format: torch.memory_format) -> None:
    """Backward gets an expanded gradient, and one in another memory format than x."""
    ours = layer(3, 4)
    x = random(8, 3, 4, 5).to(memory_format=memory_format).requires_grad_()
    other = torch.contiguous_format if memory_format is torch.channels_last else torch.channels_last
    dense = random(8, 3, 4, 5, seed=1)
    (expected,) = torch.autograd.grad(ours(x), x, dense.to(memory_format=memory_format))
    (got,) = torch.autograd.grad(ours(x), x, dense.to(memory_format=other))
    close(got, expected)
    (got,) = torch.autograd.grad(ours(x).sum(), x)
    close(got, torch.zeros_like(got))


@pytest.mark.parametrize("span", [2, 3, 6])
@pytest.mark.parametrize("rest", [(), (2, 2), (4, 4)])
def test_gradcheck(span: int, rest: tuple[int, ...]) -> None:
    ours = layer(2, span)
    x = random(6, 2, *rest).requires_grad_()
    function = lambda x, *_: ours(x)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, ours.weight, ours.bias))
    assert torch.autograd.gradcheck(lambda x, *_: ours._groups(x, rows=1, samples=6), (x, ours.weight, ours.bias))


def test_large_mean_does_not_cancel() -> None:
    ours = SpanBatchNorm(2, span=16, affine=False)
    x = random(64, 2, 5, 5) + 3e3
    exact = batch_norm(x.float().double(), torch.ones(2).double(), torch.zeros(2).double(), span=16, eps=1e-5)
    y = ours(x.float())
    assert (y - exact[0]).abs().max() < 1e-3
    torch.testing.assert_close(ours.pending_var.double(), exact[2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_half_precision_inputs_have_float32_statistics(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = (random(64, 3, 6, 6) + 4).to(dtype).to(memory_format=memory_format)
    dy = random(64, 3, 6, 6, seed=1).to(dtype).to(memory_format=memory_format)
    for span in (16, 64):
        ours, exact = layer(3, span).float(), layer(3, span)
        y, dx, dweight, dbias = run(ours, x, dy, *ours.parameters())
        expected = run(exact, x.double(), dy.double(), *exact.parameters())
        assert (y.dtype, dx.dtype, dweight.dtype, ours.pending_var.dtype) == (dtype, dtype, *[torch.float32] * 2)
        torch.testing.assert_close(ours.pending_var.double(), exact.pending_var, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.pending_mean.double(), exact.pending_mean, rtol=1e-5, atol=0)
        torch.testing.assert_close([dweight.double(), dbias.double()], expected[2:], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close([y.double(), dx.double()], expected[:2], rtol=2e-2, atol=2e-2)


def test_two_forwards_before_one_backward() -> None:
    """Collecting statistics in place does not disturb the graph of an earlier forward pass."""
    ours = layer(3, 4)
    x = random(9, 3, 4, 4).requires_grad_()
    loss = ours(x).square().sum() + ours(x * 2).square().sum()
    BatchStats(ours).commit(18)
    loss.backward()
    assert x.grad is not None


@pytest.mark.parametrize("span", [4, 8])
def test_an_empty_rank_counts_for_nothing(span: int) -> None:
    ours = layer(3, span)
    stats = BatchStats(ours)
    x = random(1, 3, 1, 1).requires_grad_()
    stats.empty(True)
    y = ours(x)
    y.backward(torch.ones_like(y))
    assert ours.seen == 0 and not y.any() and not x.grad.any()
    assert not ours.weight.grad.any() and not ours.bias.grad.any()
    assert not ours.pending_mean.any() and not ours.pending_var.any()
    stats.empty(False)
    ours(random(8, 3, 2, 2))
    assert ours.seen == 8


def test_state_dict_is_torchs() -> None:
    ours, theirs = layer(4, 2), nn.BatchNorm2d(4).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    copy.deepcopy(ours).load_state_dict(theirs.state_dict())


def test_groups_of_one_value_and_other_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm\.span = 1"):
        layer(3, 1)(random(4, 3))
    with pytest.raises(ValueError, match="momentum = None"):
        SpanBatchNorm(3, span=4, momentum=None)
    with pytest.raises(ValueError, match="samples, channels"):
        layer(3, 4)(random(3))
    layer(3, 1)(random(4, 3, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("span", [4, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 3), (16, 3, 8), (18, 3, 6, 6), (16, 3, 1, 1), (16, 3, 2, 4, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gpu_equals_cpu_without_waiting(
    span: int, dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool
) -> None:
    exact = layer(3, span)
    ours = copy.deepcopy(exact).cuda().to(torch.promote_types(dtype, torch.float32))
    x, dy = random(*shape).to(dtype), random(*shape, seed=1).to(dtype)
    if channels_last:
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    expected = run(exact, x.double(), dy.double(), *exact.parameters())
    x, dy = x.cuda(), dy.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run(ours, x, dy, *ours.parameters())
        BatchStats(ours).commit(len(x))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [t.stride() for t in results[:2]] == [x.stride()] * 2
    BatchStats(exact).commit(len(x))
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 3e-2)
    close([t.cpu().double() for t in results], expected, tolerance)
    close(ours.running_var.cpu().double(), exact.running_var, min(tolerance, 1e-4))


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1)])
def test_a_lone_last_sample_is_its_own_mean(shape: tuple[int, ...]) -> None:
    """A window of one sample, of a 1 × 1 map, where larger groups are the rule: y = β, no gradient to x or γ."""
    ours = layer(3, 8)
    stats = BatchStats(ours)
    y, dx, dgamma, dbeta = run(ours, random(1, *shape), torch.ones(1, *shape).double(), *ours.parameters())
    close(y.flatten(), ours.bias.detach())
    close((dx, dgamma), (torch.zeros_like(dx), torch.zeros_like(dgamma)))
    close(dbeta, torch.ones(3).double())
    stats.commit(1)
    assert ours.running_mean.isfinite().all() and (ours.running_var == 0.9).all()
