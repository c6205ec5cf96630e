from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.optim import LARS
from bigbatch.optim.trust import CHUNK, square, squares
from optim.problems import assert_equal, assert_near, parameters, problem, rates, train
from reference.lars import lars as twin

STEPS = 50
MOMENTA = [
    {"momentum": 0.0, "lr_placement": "inside"},
    {"momentum": 0.0, "lr_placement": "outside"},
    *({"nesterov": n, "lr_placement": "inside", "momentum_correction": c} for n, c in product((False, True), repeat=2)),
    *({"nesterov": n, "lr_placement": "outside"} for n in (False, True)),
]
RATIOS = [
    {"denominator": d, "clip_ratio": c, "weight_decay": w}
    for d, c, w in product(("sum", "joint"), (False, True), (0.0, 0.05))
]
OTHERS = [
    {"eps": 0.3},
    {"maximize": True},
    {"adapt": False},
    {"adapt": False, "maximize": True, "weight_decay": 0.0},
    {"eps": 0.3, "maximize": True, "denominator": "joint", "clip_ratio": True},
]


@pytest.mark.parametrize("momenta", MOMENTA, ids=str)
@pytest.mark.parametrize("options", [*RATIOS, *({"weight_decay": 0.05} | other for other in OTHERS)], ids=str)
def test_both_paths_equal_the_textbook_loop(options, momenta):
    weights, gradients = problem(STEPS)
    options = {"trust_coefficient": 0.02, **options, **momenta}
    # clip_ratio compares λ (about 0.02) with the rate: let the schedule cross it
    lrs = rates(STEPS, 0.04 if options.get("clip_ratio") else 0.5)
    expected = twin(weights, gradients, lrs, **options)
    for kernel in ("fused", "foreach"):
        params = parameters(weights)
        assert_equal(train(LARS(params, 1.0, kernel=kernel, **options), params, gradients, lrs), expected)


@pytest.mark.parametrize("momenta", MOMENTA, ids=str)
@pytest.mark.parametrize("options", [*RATIOS, *({"weight_decay": 0.05} | other for other in OTHERS)], ids=str)
def test_a_hundred_steps_in_float32(options, momenta):
    weights, gradients = problem(100, dtype=torch.float32)
    options = {"trust_coefficient": 0.02, **options, **momenta}
    lrs = rates(100, 0.04 if options.get("clip_ratio") else 0.5)
    expected = twin([w.double() for w in weights], [[g.double() for g in row] for row in gradients], lrs, **options)
    for kernel in ("fused", "foreach"):
        params = parameters(weights)
        assert_near(train(LARS(params, 1.0, kernel=kernel, **options), params, gradients, lrs), expected)


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
@pytest.mark.parametrize("clip_ratio", [False, True])
@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_tensor_rate_equals_float_rate(placement, clip_ratio, kernel):
    weights, gradients = problem(STEPS)
    options = {"weight_decay": 0.05, "lr_placement": placement, "nesterov": True, "clip_ratio": clip_ratio}
    results = []
    for lr in (1.0, torch.tensor(1.0, dtype=torch.float64)):
        params = parameters(weights)
        results.append(train(LARS(params, lr, kernel=kernel, **options), params, gradients, rates(STEPS, 0.5)))
    assert_equal(*results)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_ratio_one_is_sgd_at_a_constant_rate(placement, nesterov):
    weights, gradients = problem(STEPS)
    options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.05}
    ours, theirs = parameters(weights), parameters(weights)
    train(LARS(ours, 0.1, adapt=False, lr_placement=placement, **options), ours, gradients, [0.1] * STEPS)
    train(torch.optim.SGD(theirs, 0.1, **options), theirs, gradients, [0.1] * STEPS)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("nesterov", [False, True])
def test_ratio_one_outside_is_sgd_at_any_rates(nesterov):
    weights, gradients = problem(STEPS)
    options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.05}
    ours, theirs = parameters(weights), parameters(weights)
    train(LARS(ours, 0.1, adapt=False, lr_placement="outside", **options), ours, gradients, rates(STEPS, 0.2))
    train(torch.optim.SGD(theirs, 0.1, **options), theirs, gradients, rates(STEPS, 0.2))
    assert_equal(ours, theirs)


def test_rate_at_the_cap_everywhere_is_sgd():
    """With λ far above the scheduled rate, LARC is plain SGD."""
    weights, gradients = problem(STEPS)
    ours, theirs = parameters(weights), parameters(weights)
    train(LARS(ours, 0.1, trust_coefficient=1e9, clip_ratio=True, weight_decay=0.05), ours, gradients, [0.01] * STEPS)
    train(torch.optim.SGD(theirs, 0.1, momentum=0.9, weight_decay=0.05), theirs, gradients, [0.01] * STEPS)
    assert_equal(ours, theirs)


def test_zero_rate_is_safe_and_momentum_is_kept_through_it_by_the_correction():
    weights, gradients = problem(12)
    lrs = [0.0, 0.0, 0.1, 0.2, 0.0, 0.3, 0.0, 0.1, 0.1, 0.1, 0.0, 0.1]
    results = {}
    for name, options in {
        "inside": {},
        "corrected": {"momentum_correction": True},
        "clipped": {"momentum_correction": True, "clip_ratio": True},
        "outside": {"lr_placement": "outside"},
    }.items():
        params = parameters(weights)
        results[name] = train(LARS(params, 0.0, weight_decay=0.05, **options), params, gradients, lrs)
        assert all(p.isfinite().all() for p in params)
    assert_equal(results["corrected"], results["outside"], 0)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e4, 1e12])
def test_both_paths_agree_in_float32_however_large_the_gradient(scale, nesterov):
    """λ falls to 1e-15 here, where 1 − (1 − γλ) would be 0 or double its value."""
    weights, gradients = problem(6, shapes=[(30, 40)], dtype=torch.float32)
    gradients = [[scale * g for g in gradient] for gradient in gradients]
    options = {"nesterov": nesterov, "weight_decay": 0.0}
    fused, foreach = parameters(weights), parameters(weights)
    train(LARS(fused, 1.0, kernel="fused", **options), fused, gradients, [50.0] * 6)
    train(LARS(foreach, 1.0, kernel="foreach", **options), foreach, gradients, [50.0] * 6)
    assert (fused[0] - weights[0]).norm() > 0.1 * weights[0].norm()
    assert (fused[0] - foreach[0]).norm() < 1e-6 * weights[0].norm()


def test_nesterov_where_decay_takes_most_of_the_weight():
    """1 − γλβ, by which two kernels would divide, is 0 at first and negative with other numbers."""
    weights, gradients = problem(20, shapes=[(4, 3)])
    for beta in (1.0, 1.7):
        options = {"nesterov": True, "weight_decay": beta, "adapt": False, "momentum": 0.5}
        ours = parameters(weights)
        train(LARS(ours, 1.0, kernel="fused", **options), ours, gradients, [1.0] * 20)
        assert_equal(ours, twin(weights, gradients, [1.0] * 20, **options))


def test_weight_decay_zero_still_adapts():
    w, g = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])
    p = torch.nn.Parameter(w.clone())
    train(LARS([p], 2.0, weight_decay=0.0), [p], [[g]], [2.0])
    torch.testing.assert_close(p.detach(), w - 2.0 * 0.001 * 5.0 / 1.0 * g)


@pytest.mark.parametrize("w, g", [([0.0, 0.0], [3.0, 4.0]), ([3.0, 4.0], [0.0, 0.0])])
@pytest.mark.parametrize("options", [{}, {"clip_ratio": True}, {"denominator": "joint"}])
def test_zero_norm_means_ratio_one(w, g, options):
    p = torch.nn.Parameter(torch.tensor(w))
    train(LARS([p], 0.1, weight_decay=0.5, **options), [p], [[torch.tensor(g)]], [0.1])
    torch.testing.assert_close(p.detach(), torch.tensor(w) - 0.1 * (torch.tensor(g) + 0.5 * torch.tensor(w)))


def test_gradient_that_cancels_the_decay_moves_nothing():
    p = torch.nn.Parameter(torch.tensor([2.0, -4.0]))
    train(LARS([p], 0.1, weight_decay=0.5, denominator="joint"), [p], [[-0.5 * p.detach()]], [0.1])
    assert p.tolist() == [2.0, -4.0]


@settings(max_examples=30, deadline=None)
@given(
    c=st.floats(1e-6, 1e6),
    seed=st.integers(0, 1000),
    placement=st.sampled_from(["inside", "outside"]),
    denominator=st.sampled_from(["sum", "joint"]),
)
def test_scale_of_the_gradient_does_not_matter_without_decay(c, seed, placement, denominator):
    """g → c·g leaves η‖w‖/‖g‖ · g, hence the update, unchanged, where no norm is 0."""
    weights, gradients = problem(5, seed=seed)
    weights[-1].add_(1.0)
    for gradient in gradients:
        gradient[-2].add_(1.0)
    options = {"lr_placement": placement, "denominator": denominator}
    plain, scaled = parameters(weights), parameters(weights)
    train(LARS(plain, 1.0, **options), plain, gradients, [100.0] * 5)
    train(LARS(scaled, 1.0, **options), scaled, [[c * g for g in gradient] for gradient in gradients], [100.0] * 5)
    assert_equal(plain, scaled, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_keep_their_digits_over_many_elements_in_any_order_of_memory(dtype):
    """One float32 dot product over all these elements is off by 1e-4."""
    t = torch.rand(3, 43, 2**16, generator=torch.Generator().manual_seed(0), dtype=dtype)[:, :, : 2**16 - 3].clone()
    assert t.numel() > 8 * CHUNK
    expected = t.double().square().sum().item()
    for view in (t, t.transpose(0, 2), t.transpose(1, 2)):
        assert square(view) == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-13)
    found = squares([t, torch.ones(0, 2, dtype=dtype), torch.tensor(-3.0, dtype=dtype)])
    torch.testing.assert_close(found, torch.tensor([expected, 0, 9], dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"nesterov": True, "momentum": 0.0}, "nesterov = True"),
        ({"momentum_correction": True, "momentum": 0.0}, "momentum_correction = True"),
        ({"momentum_correction": True, "lr_placement": "outside"}, "momentum_correction = True"),
        ({"lr_placement": "between"}, "lr_placement = 'between'"),
        ({"denominator": "product"}, "denominator = 'product'"),
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"trust_coefficient": 0.0}, "trust_coefficient = 0.0"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0"),
        ({"eps": float("nan")}, "eps = nan"),
        ({"lr": -0.1}, "lr = -0.1"),
        ({"lr": torch.ones(1)}, "lr = tensor of shape"),
    ],
)
def test_illegal_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        LARS(parameters([torch.ones(2)]), **{"lr": 0.1, **options})
    with pytest.raises(ValueError, match=named):
        optimizer = LARS(parameters([torch.ones(2)]), 0.1)
        optimizer.add_param_group({"params": parameters([torch.ones(2)]), **options})
    assert len(optimizer.param_groups) == 1
