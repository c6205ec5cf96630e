"""The Triton kernels, on a GPU where there is one and else in Triton's interpreter, which conftest.py switches on."""

from __future__ import annotations

import copy
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bigbatch.optim import LAMB, LARS
from optim.problems import assert_equal, parameters, problem, rates, shard_like, train
from ranks import run_ranks
from reference.lamb import lamb as lamb_twin
from reference.lars import lars as lars_twin

kernels = pytest.importorskip("bigbatch.optim.triton")
DEVICE = kernels.DEVICE
CHUNK = 16
LARS_OPTIONS = [
    {"weight_decay": 0.05},
    {"weight_decay": 0.05, "nesterov": True, "momentum_correction": True, "clip_ratio": True, "maximize": True},
    {"weight_decay": 0.05, "nesterov": True, "lr_placement": "outside", "denominator": "joint", "maximize": True},
    {"weight_decay": 0.05, "momentum": 0.0, "eps": 0.1, "trust_coefficient": 0.5, "denominator": "joint"},
    {"weight_decay": 0.05, "adapt": False, "nesterov": True, "maximize": True},
    {"momentum": 0.0, "adapt": False},
]
LAMB_OPTIONS = [
    {"weight_decay": 0.05},
    {"weight_decay": 0.05, "prenormalize": True, "clamp_weight_norm": 1.0, "maximize": True, "capturable": True},
    {"weight_decay": 0.05, "bias_correction": False, "betas": (0.0, 0.9), "eps": 0.1},
    {"weight_decay": 0.05, "adapt": False, "maximize": True},
]
VARIANTS = [(LARS, options) for options in LARS_OPTIONS] + [(LAMB, options) for options in LAMB_OPTIONS]
TWINS = {LARS: lars_twin, LAMB: lamb_twin}
name_of = pytest.mark.parametrize(
    "kind, options", [pytest.param(*variant, id=f"{variant[0].__name__}-{i}") for i, variant in enumerate(VARIANTS)]
)


pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", CHUNK)


def optimizer_of(kind, params, **options):
    return kind(params, options.pop("lr", 1.0), kernel="triton", **options)


def moved(tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def twin_of(kind, options, weights, gradients, lrs):
    options = {key: value for key, value in options.items() if key != "capturable"}
    return TWINS[kind](weights, gradients, lrs, **options)


@name_of
def test_equals_the_textbook(kind, options):
    weights, gradients = problem(3)
    params = parameters(moved(weights))
    train(optimizer_of(kind, params, **options), params, [moved(g) for g in gradients], rates(3, 0.1))
    assert_equal([p.cpu() for p in params], twin_of(kind, options, weights, gradients, rates(3, 0.1)))


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_float32_and_a_tensor_as_rate(kind):
    weights, gradients = problem(20, shapes=[(2, 9), (3,)], dtype=torch.float32)
    params = parameters(moved(weights))
    optimizer = optimizer_of(kind, params, weight_decay=0.05, lr=torch.tensor(1.0, device=DEVICE))
    train(optimizer, params, [moved(g) for g in gradients], rates(20, 0.02))
    wide = [w.double() for w in weights], [[g.double() for g in gradient] for gradient in gradients]
    assert_equal(
        [p.cpu().double() for p in params], twin_of(kind, {"weight_decay": 0.05}, *wide, rates(20, 0.02)), 1e-6
    )


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_sizes_around_a_chunk_and_any_layout(kind):
    """Each weight has its gradient in its own layout, or, every second one, in another; each misses a step."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (3 * CHUNK,), (), (0,)]
    weights = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    weights += [
        torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last),
        torch.randn(3, 7, generator=generator, dtype=torch.float64).t(),
        torch.randn(5, 2, generator=generator, dtype=torch.float64)[:, 0],
    ]
    gradients = [[torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights] for _ in range(3)]
    for gradient in gradients:
        gradient[1::2] = [torch.empty_like(w).copy_(g) for w, g in zip(weights[1::2], gradient[1::2], strict=True)]
    holes = [[None if (i + t) % 3 == 0 else g for i, g in enumerate(gradient)] for t, gradient in enumerate(gradients)]
    params = parameters(moved(weights))
    params[-1] = nn.Parameter(torch.stack([params[-1].detach()] * 2, 1)[:, 0])  # copies have no gaps
    train(optimizer_of(kind, params, weight_decay=0.05, eps=0.0), params, [moved(g) for g in holes], [0.1] * 3)
    for i, p in enumerate(params):
        seen = [[gradient[i]] for gradient in holes if gradient[i] is not None]
        assert_equal([p.cpu()], TWINS[kind]([weights[i]], seen, [0.1] * len(seen), weight_decay=0.05, eps=0.0))


@pytest.fixture
def counted(monkeypatch):
    """How often each kernel was launched, and how many tables were made."""
    seen = Counter()
    run, made = type(kernels._sum).run, kernels.Table.__init__

    def count_run(self, *args, **kwargs):
        seen[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    def count_table(self, *args):
        seen["tables"] += 1
        made(self, *args)

    monkeypatch.setattr(type(kernels._sum), "run", count_run)
    monkeypatch.setattr(kernels.Table, "__init__", count_table)
    return seen


@pytest.mark.parametrize(
    "kind, adapt, expected",
    [
        (LARS, True, {"lars_squares": 1, "_sum": 1, "lars_step": 1}),
        (LARS, False, {"lars_step": 1}),
        (LAMB, True, {"lamb_moments": 1, "_sum": 1, "lamb_descent": 1}),
        (LAMB, False, {"lamb_moments": 1}),
    ],
)
def test_launches_of_a_step_and_what_lasts_between_steps(kind, adapt, expected, counted):
    weights, gradients = problem(1)
    params = parameters(moved(weights))
    optimizer = optimizer_of(kind, params, adapt=adapt)
    for p, g in zip(params, moved(gradients[0]), strict=True):
        p.grad = g.clone()
    versions, before = [p._version for p in params], [p.grad._version for p in params]
    optimizer.step()
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
    assert counted == expected | {"tables": 1}
    optimizer.step()
    assert counted == {name: 2 * times for name, times in expected.items()} | {"tables": 1}
    assert_equal([p.grad for p in params], moved(gradients[0]), 0)
    assert [p.grad._version for p in params] == before
    assert optimizer._scratch == {}
    params[0].grad = params[0].grad.clone()
    optimizer.step()
    assert counted["tables"] == 2
    assert copy.deepcopy(optimizer)._tables == {}


def test_squares_of_float32_keep_their_digits(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 4096)
    w = torch.randn(4096 * 300 if DEVICE == "cuda" else 4096 * 3 + 5, generator=torch.Generator().manual_seed(0))
    ways = moved([w]), moved([3 * w])
    table = kernels.Table(ways)
    w2, g2 = table.squares(kernels.lars_squares, 2, 0.0, JOINT=False).cpu()
    assert w2.dtype == torch.float64
    torch.testing.assert_close(w2, w.double().square().sum().expand(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(g2, 9 * w2, rtol=1e-6, atol=0)


def test_sums_over_more_chunks_than_are_added_at_a_time():
    ways = [moved([torch.empty(CHUNK * chunks) for chunks in (3, 2 * kernels.WIDTH.value + 5)])]
    table = kernels.Table(ways)
    table.partials.normal_()
    sums = table.partials.new_empty(2, 2)
    kernels._sum[(2, 2)](table.rows, table.partials, sums, CHUNK=CHUNK)
    assert_equal(sums.T, [table.partials[:3, :2].sum(0), table.partials[3:, :2].sum(0)])


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_low_precision_is_the_float32_run_rounded(kind):
    weights, gradients = problem(2, shapes=[(2, 9)], dtype=torch.bfloat16)
    low, wide = parameters(moved(weights)), parameters([w.float() for w in moved(weights)])
    train(optimizer_of(kind, low), low, [moved(g) for g in gradients], [0.1] * 2)
    train(optimizer_of(kind, wide), wide, [[g.float() for g in moved(gradient)] for gradient in gradients], [0.1] * 2)
    assert torch.equal(low[0], wide[0].bfloat16())


PIECES = [(5, 3), (9,)]
CASES = [(LARS, {"weight_decay": 0.05, "denominator": "joint"}), (LAMB, {"weight_decay": 0.05, "prenormalize": True})]


def in_pieces(rank):
    return [sharded_and_partitioned(rank, kind, options) for kind, options in CASES]


def sharded_and_partitioned(rank, kind, options):
    """Fully sharded layers, and a partition of them: the first and 4 elements of the second on process 0, 5 on 1."""
    kernels.CHUNK = 8
    weights, gradients = problem(2, shapes=PIECES)
    net = fully_shard(nn.ParameterList(parameters(weights)), mesh=init_device_mesh("cpu", (2,)))
    sharded = list(net.parameters())
    pieces = [[*map(shard_like, sharded, gradient)] for gradient in gradients]
    train(optimizer_of(kind, sharded, **options), sharded, pieces, [0.1] * 2)
    mine = slice(0, 19) if rank == 0 else slice(19, 24)
    flat = [torch.cat([t.flatten() for t in tensors])[mine].clone() for tensors in (weights, *gradients)]
    partition = nn.Parameter(flat[0])
    optimizer = optimizer_of(kind, [partition], **options)
    optimizer.set_segments(partition, [(0, 0, 15), (1, 15, 19)] if rank == 0 else [(1, 0, 5)], layers=2)
    train(optimizer, [partition], [[g] for g in flat[1:]], [0.1] * 2)
    return [p.full_tensor().detach() for p in sharded], partition.detach()


@pytest.mark.skipif(DEVICE == "cuda", reason="two processes would need two GPUs")
def test_pieces_equal_whole_layers():
    weights, gradients = problem(2, shapes=PIECES)
    for (kind, options), results in zip(CASES, zip(*run_ranks(2, in_pieces), strict=True), strict=True):
        expected = TWINS[kind](weights, gradients, [0.1] * 2, **options)
        for sharded, _ in results:
            assert_equal(sharded, expected)
        partitions = torch.cat([partition for _, partition in results])
        assert_equal([partitions], [torch.cat([w.flatten() for w in expected])])


def test_what_cannot_be_is_refused_with_a_way_out(monkeypatch):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"kernel = 'cuda': choose auto, fused, foreach or triton"):
        LARS([p], 0.1, kernel="cuda")
    monkeypatch.setattr(kernels, "DEVICE", "cuda")
    with pytest.raises(ValueError, match=r"kernel = 'triton': .*TRITON_INTERPRET=1 .* params\[0\] .* cpu; choose auto"):
        LARS([p], 0.1, kernel="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"kernel = 'triton': install the package triton, or choose auto"):
        LAMB([p], 0.1, kernel="triton")
