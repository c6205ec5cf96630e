"""bfloat16 and float16 parameters: float32 state, and a master copy or stochastic rounding for the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bigbatch.optim import LAMB, LARS, rounding
from bigbatch.optim.rounding import round_stochastically
from optim.problems import parameters, problem, rates, shard_like, train
from ranks import run_ranks

LOW = (torch.bfloat16, torch.float16)
STEPS = 20
low = pytest.mark.parametrize("dtype", LOW)
each = pytest.mark.parametrize(
    "kind, options", [(LARS, {"weight_decay": 0.05, "trust_coefficient": 0.02}), (LAMB, {"weight_decay": 0.05})]
)
kernels = pytest.mark.parametrize("kernel", ["fused", "foreach"])


@each
@kernels
@low
def test_master_weights_are_the_float32_run_rounded(dtype, kernel, kind, options):
    weights, gradients = problem(STEPS, dtype=dtype)
    ours, wide = parameters(weights), parameters([w.float() for w in weights])
    optimizer = kind(ours, 1.0, kernel=kernel, **options)
    train(optimizer, ours, gradients, rates(STEPS, 0.1))
    train(
        kind(wide, 1.0, kernel=kernel, **options), wide, [[g.float() for g in x] for x in gradients], rates(STEPS, 0.1)
    )
    for p, w in zip(ours, wide, strict=True):
        assert torch.equal(p, w.to(dtype)) and torch.equal(optimizer.state[p]["master"], w.detach())
        assert all(s.dtype == torch.float32 for s in optimizer.state[p].values())


@each
def test_weights_that_are_loaded_before_the_first_step_reach_the_master(kind, options):
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = kind([p], 0.0, **options)
    with torch.no_grad():
        p.fill_(2.0)
    train(optimizer, [p], [[torch.ones(3, dtype=torch.bfloat16)]], [0.0])
    assert p.tolist() == [2.0] * 3


@pytest.mark.parametrize("low_precision", ["master", "stochastic"])
@low
def test_small_updates_add_up_where_plain_rounding_stalls(dtype, low_precision):
    """600 steps of −2⁻¹³ from 1, where half the distance to the next number is 2⁻¹⁰ in bfloat16, 2⁻¹³ in float16."""
    start, steps, rate = torch.ones(4096, dtype=dtype), 600, 2.0**-13
    plain, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    gradients = [[torch.full_like(start, 0.5)]] * steps
    train(torch.optim.SGD([plain], rate, foreach=True), [plain], gradients, [rate] * steps)
    optimizer = LARS([ours], rate, momentum=0.0, adapt=False, low_precision=low_precision)
    train(optimizer, [ours], gradients, [rate] * steps)
    expected = 1 - steps * rate / 2
    assert plain.eq(1).all()
    assert ours.double().mean().item() == pytest.approx(expected, abs=0.05 * (1 - expected))
    assert ("master" in optimizer.state[ours]) == (low_precision == "master")


@settings(max_examples=30, deadline=None)
@given(
    value=st.floats(-70000, 70000, width=32) | st.floats(-(2.0**-20), 2.0**-20, width=32),
    dtype=st.sampled_from(LOW),
    place=st.integers(0, 1000),
    step=st.integers(1, 1000),
)
def test_rounds_to_a_neighbour_and_is_right_on_average(value, dtype, place, step):
    """The mean of n draws from two values a gap h apart is within 5·h/(2√n) of its expectation, but once in 10⁶."""
    n = 20_000
    x = torch.full((n,), value)
    rounded = torch.empty(n, dtype=dtype)
    round_stochastically(x, rounded, place=place, step=torch.tensor(float(step)))
    nearest = x[:1].to(dtype)
    if not nearest.isfinite() or nearest == x[:1]:
        assert rounded.eq(nearest).all()
        return
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf)).double()
    below = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf)).double()
    low_side, high_side = (below, nearest.double()) if nearest.double() > value else (nearest.double(), above)
    assert ((rounded.double() == low_side) | (rounded.double() == high_side)).all()
    if high_side.isfinite() and low_side.isfinite():
        gap = (high_side - low_side).item()
        assert abs(rounded.double().mean().item() - value) <= 2.5 * gap / n**0.5


def test_draws_belong_to_the_parameter_the_step_and_the_element():
    x = torch.full((4, 3000), 1 + 2.0**-9)
    draw = {}
    for place, step in ((0, 1), (0, 2), (1, 1)):
        draw[place, step] = torch.empty(4, 3000, dtype=torch.bfloat16)
        round_stochastically(x, draw[place, step], place=place, step=torch.tensor(float(step)))
    rows = [*draw.values(), draw[0, 1].flip(0)]
    for i, a in enumerate(rows):
        for b in rows[:i]:
            assert a.eq(b).double().mean().item() == pytest.approx(0.625, abs=0.03)  # 0.25² + 0.75²
    other_layout = torch.empty(3000, 4, dtype=torch.bfloat16).t()
    round_stochastically(x, other_layout, place=0, step=torch.tensor(1.0))
    assert torch.equal(other_layout, draw[0, 1])
    round_stochastically(torch.tensor(1 + 2.0**-9), scalar := torch.empty((), dtype=torch.bfloat16), place=0,
                         step=torch.tensor(1.0))  # fmt: skip
    assert scalar == draw[0, 1][0, 0]


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    x = torch.full((5, 3, 2), 1 + 2.0**-9)
    found = []
    for elements in (1 << 20, 12, 1):
        monkeypatch.setattr(rounding, "_ROWS_OF", elements)
        found.append(torch.empty(5, 3, 2, dtype=torch.bfloat16))
        round_stochastically(x, found[-1], place=0, step=torch.tensor(1.0))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert len({tuple(row.flatten().tolist()) for row in found[0]}) > 1


@each
@kernels
@low
@pytest.mark.parametrize("low_precision", ["master", "stochastic"])
def test_replicas_and_resumed_runs_are_equal_bit_for_bit(low_precision, dtype, kernel, kind, options):
    weights, gradients = problem(STEPS, dtype=dtype)
    runs = []
    for _ in range(2):
        params = parameters(weights)
        optimizer = kind(params, 1.0, kernel=kernel, low_precision=low_precision, **options)
        runs.append((optimizer, train(optimizer, params, gradients[:9], rates(STEPS, 0.1)[:9])))
    (first, ours), (second, theirs) = runs
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    third = parameters(ours)
    resumed = kind(third, 1.0, kernel=kernel, low_precision=low_precision, **options)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(ours, third, strict=True):
        for key, value in first.state[p].items():
            assert torch.equal(resumed.state[q][key], value) and resumed.state[q][key].dtype == torch.float32
    for optimizer, params in ((second, theirs), (resumed, third)):
        train(optimizer, params, gradients[9:], rates(STEPS, 0.1)[9:])
    assert all(torch.equal(a, b) for a, b in zip(theirs, third, strict=True))


def sharded(rank, low_precision):
    weights, gradients = problem(8, shapes=[(5, 3), (4,)], dtype=torch.bfloat16)
    net = nn.Module()
    net.weights = nn.ParameterList(w.clone() for w in weights)
    params = list(fully_shard(net, mesh=init_device_mesh("cpu", (2,))).parameters())
    optimizer = LARS(params, 0.1, trust_coefficient=0.5, low_precision=low_precision)
    for gradient in gradients:
        for p, g in zip(params, gradient, strict=True):
            p.grad = shard_like(p, g)
        optimizer.step()
    return [p.full_tensor().detach() for p in params]


@pytest.mark.parametrize("low_precision", ["master", "stochastic"])
def test_shards_round_as_the_whole_does(low_precision):
    weights, gradients = problem(8, shapes=[(5, 3), (4,)], dtype=torch.bfloat16)
    params = parameters(weights)
    optimizer = LARS(params, 0.1, trust_coefficient=0.5, low_precision=low_precision)
    train(optimizer, params, gradients, [0.1] * 8)
    for ours in run_ranks(2, sharded, low_precision):
        assert all(torch.equal(a, b) for a, b in zip(ours, params, strict=True))


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="low_precision = 'none': choose master or stochastic"):
        LARS(parameters([torch.ones(2)]), 0.1, low_precision="none")
