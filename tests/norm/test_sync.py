"""Synchronised over real ranks: equal to one process's batch norm over all their samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ranks import run_ranks
from reference.batch_norm import batch_norm

SHAPES = {"flat": (4,), "image": (4, 3, 2)}


def network(shape: tuple[int, ...], norm) -> nn.Module:
    torch.manual_seed(0)
    channels = shape[0]
    mix = nn.Linear(channels, channels) if len(shape) == 1 else nn.Conv2d(channels, channels, 3, padding=1)
    model = nn.Sequential(norm(), nn.Tanh(), mix, norm()).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def window(shape: tuple[int, ...], step: int, n: int) -> tuple[Tensor, Tensor]:
    """Samples, and the weights of the outputs in the loss."""
    generator = torch.Generator().manual_seed(step)
    x = 2 * torch.randn(n, *shape, generator=generator, dtype=torch.float64) + 3
    return x, torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def on_rank(rank: int, block: int, sizes: list[list[int]], shape: tuple[int, ...], memory_format: str):
    """Micro-steps of one optimiser step; outputs, input gradients, summed parameter gradients, running statistics."""
    import torch.distributed as dist

    from bigbatch.norm import BatchStats, SpanBatchNorm

    world, calls = dist.get_world_size(), 0
    blocks = [dist.new_group(range(first, first + block)) for first in range(0, world, block)]

    def reduce(tensor: Tensor) -> None:
        nonlocal calls
        calls += 1
        dist.all_reduce(tensor, group=blocks[rank // block])

    model = network(shape, lambda: SpanBatchNorm(shape[0], span=8 * block, reduce=reduce))
    stats = BatchStats(model)
    outputs = []
    for step, counts in enumerate(sizes):
        whole, weights = window(shape, step, sum(counts))
        start = sum(counts[:rank])
        mine = slice(start, start + counts[rank]) if counts[rank] else slice(0, 1)
        stats.empty(not counts[rank])
        x = whole[mine]
        if memory_format == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        x.requires_grad_()
        y = model(x)
        assert y.stride() == x.stride()
        (y * weights[mine]).sum().backward()
        if not counts[rank]:
            assert not y.any() and not x.grad.any()
        outputs.append((y.detach()[: counts[rank]], x.grad[: counts[rank]]))
    assert calls == 2 * 2 * len(sizes)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    stats.commit(sum(map(sum, sizes)))
    stats.merge(dist.all_reduce, rank)
    return outputs, [p.grad for p in model.parameters()], dict(model.named_buffers())


def on_one_process(block: int, sizes: list[list[int]], shape: tuple[int, ...]):
    model = network(shape, lambda: (nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d)(shape[0]))
    outputs, moments = [], []
    for step, counts in enumerate(sizes):
        whole, weights = window(shape, step, sum(counts))
        per_rank = []
        for first in range(0, len(counts), block):
            start, stop = sum(counts[:first]), sum(counts[: first + block])
            if start == stop:
                per_rank += [(whole[:0], whole[:0])] * block
                continue
            x = whole[start:stop].clone().requires_grad_()
            y = model(x)
            (y * weights[start:stop]).sum().backward()
            split = counts[first : first + block]
            per_rank += zip(y.detach().split(split), x.grad.split(split), strict=True)
            _, mean, var = batch_norm(x.detach(), *model[0].parameters(), span=stop - start, eps=1e-5)
            moments.append(((stop - start) * mean, (stop - start) * var))
        outputs.append(per_rank)
    n = sum(map(sum, sizes))
    mean, var = (sum(values).detach() / n for values in zip(*moments, strict=True))
    return outputs, [p.grad for p in model.parameters()], (0.1 * mean, 0.9 + 0.1 * var)


@pytest.mark.parametrize(
    ("world", "block", "sizes", "shape", "memory_format"),
    [
        (2, 2, [[8, 8]], "image", "contiguous"),
        (2, 2, [[5, 3], [4, 0]], "image", "channels_last"),
        (3, 3, [[1, 4, 2], [0, 7, 0]], "flat", "contiguous"),
        (4, 2, [[8, 7, 3, 0], [2, 1, 0, 0]], "image", "contiguous"),
    ],
)
def test_ranks_equal_one_process(world: int, block: int, sizes, shape: str, memory_format: str) -> None:
    results = run_ranks(world, on_rank, block, sizes, SHAPES[shape], memory_format)
    outputs, gradients, (mean, var) = on_one_process(block, sizes, SHAPES[shape])

    def close(ours, theirs) -> None:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    for rank, (mine, summed, buffers) in enumerate(results):
        for step, (y, dx) in enumerate(mine):
            close((y, dx), outputs[step][rank])
        close(summed, gradients)
        close((buffers["0.running_mean"], buffers["0.running_var"]), (mean, var))
        for name, buffer in buffers.items():
            if "pending" not in name:
                close(buffer, results[0][2][name])


def large_mean(rank: int):
    import torch.distributed as dist

    from bigbatch.norm import SpanBatchNorm

    ours = SpanBatchNorm(2, span=64, affine=False, reduce=dist.all_reduce)
    x = 3e3 + torch.randn(64, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ours(x.float()[rank * 32 : rank * 32 + 32]), ours.pending_var


def test_large_mean_does_not_cancel_in_float32() -> None:
    (first, var, *_), (second, _) = run_ranks(2, large_mean)
    x = 3e3 + torch.randn(64, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, _, expected = batch_norm(x.float().double(), torch.ones(2).double(), torch.zeros(2).double(), span=64, eps=1e-5)
    torch.testing.assert_close(var.double(), expected, rtol=1e-4, atol=0)
    assert (torch.cat([first, second]) - y).abs().max() < 1e-3
