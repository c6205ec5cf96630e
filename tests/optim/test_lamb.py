from __future__ import annotations

from itertools import product

import pytest
import torch

from bigbatch.optim import LAMB
from optim.problems import assert_equal, assert_near, parameters, problem, rates, train
from reference.lamb import lamb as twin

STEPS = 50
FLAGS = ("bias_correction", "prenormalize", "adapt", "maximize")


@pytest.mark.parametrize("flags", [dict(zip(FLAGS, f, strict=True)) for f in product((False, True), repeat=4)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("clamp", [None, 1.5])
def test_both_paths_equal_the_textbook_loop(clamp, weight_decay, flags):
    weights, gradients = problem(STEPS)
    options = {"clamp_weight_norm": clamp, "weight_decay": weight_decay, **flags}
    expected = twin(weights, gradients, rates(STEPS, 0.05), **options)
    for kernel in ("fused", "foreach"):
        params = parameters(weights)
        ours = train(LAMB(params, 1.0, kernel=kernel, **options), params, gradients, rates(STEPS, 0.05))
        assert_equal(ours, expected)


@pytest.mark.parametrize("flags", [dict(zip(FLAGS, f, strict=True)) for f in product((False, True), repeat=4)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("clamp", [None, 1.5])
def test_a_hundred_steps_in_float32(clamp, weight_decay, flags):
    weights, gradients = problem(100, dtype=torch.float32)
    options = {"clamp_weight_norm": clamp, "weight_decay": weight_decay, **flags}
    wide = [[g.double() for g in row] for row in gradients]
    expected = twin([w.double() for w in weights], wide, rates(100, 0.05), **options)
    for kernel in ("fused", "foreach"):
        params = parameters(weights)
        ours = train(LAMB(params, 1.0, kernel=kernel, **options), params, gradients, rates(100, 0.05))
        assert_near(ours, expected)


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
@pytest.mark.parametrize("options", [{"betas": (0.0, 0.9)}, {"betas": (0.5, 0.0)}, {"eps": 0.1}], ids=str)
def test_equals_the_textbook_loop_at_other_numbers(options, kernel):
    weights, gradients = problem(STEPS)
    params = parameters(weights)
    ours = train(LAMB(params, 1.0, kernel=kernel, **options), params, gradients, rates(STEPS, 0.05))
    assert_equal(ours, twin(weights, gradients, rates(STEPS, 0.05), **options))


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_rate_and_capturable_change_nothing(capturable, kernel):
    weights, gradients = problem(STEPS)
    results = []
    for lr, options in ((1.0, {}), (torch.tensor(1.0, dtype=torch.float64), {"capturable": capturable})):
        params = parameters(weights)
        optimizer = LAMB(params, lr, weight_decay=0.05, kernel=kernel, **options)
        results.append(train(optimizer, params, gradients, rates(STEPS, 0.05)))
    assert_equal(*results)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_ratio_one_is_adamw(weight_decay):
    """AdamW's decay is (1−γλ)w, LAMB's is −γ·λw inside the update: the same number once the ratio is 1."""
    weights, gradients = problem(STEPS)
    options = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": weight_decay}
    ours, theirs = parameters(weights), parameters(weights)
    train(LAMB(ours, 1.0, adapt=False, **options), ours, gradients, rates(STEPS, 0.05))
    train(torch.optim.AdamW(theirs, 1.0, **options), theirs, gradients, rates(STEPS, 0.05))
    assert_equal(ours, theirs)


def test_update_has_the_length_of_the_rate_times_the_weight():
    weights, gradients = problem(1, shapes=[(4, 3)])
    for options in ({}, {"weight_decay": 0.3}, {"eps": 1.0}):
        params = parameters(weights)
        train(LAMB(params, 0.1, **options), params, gradients, [0.1])
        moved = (params[0].detach() - weights[0]).norm()
        torch.testing.assert_close(moved, 0.1 * weights[0].norm(), rtol=1e-12, atol=0)


def test_prenormalisation_spans_all_groups_and_is_per_group():
    weights, gradients = problem(STEPS, shapes=[(3, 2), (4,), (2, 2)])
    every = 3.0
    whole = [[every * g for g in gradient] for gradient in gradients]
    ours, theirs = parameters(weights), parameters(weights)
    groups = [{"params": ours[:1]}, {"params": ours[1:2]}, {"params": ours[2:], "prenormalize": False}]
    train(LAMB(groups, 0.01, prenormalize=True, eps=0.1), ours, whole, [0.01] * STEPS)
    norm = [torch.cat([g.flatten() for g in gradient]).norm() for gradient in whole]
    divided = [[g[0] / n, g[1] / n, g[2]] for g, n in zip(whole, norm, strict=True)]
    train(LAMB(theirs, 0.01, eps=0.1), theirs, divided, [0.01] * STEPS)
    assert_equal(ours, theirs)


def test_all_gradients_zero_with_prenormalisation_is_finite():
    p = torch.nn.Parameter(torch.ones(3))
    train(LAMB([p], 0.1, prenormalize=True), [p], [[torch.zeros(3)]] * 2, [0.1] * 2)
    assert p.tolist() == [1.0, 1.0, 1.0]


def test_float32_bias_correction_keeps_its_digits():
    """1 − 0.999 in float32 is off by 5e-5; through expm1 the first update is the sign of g to 1e-6."""
    p = torch.nn.Parameter(torch.ones(2))
    train(LAMB([p], 1.0, adapt=False, eps=1e-12), [p], [[torch.tensor([3.0, -0.5])]], [1.0])
    torch.testing.assert_close(p.detach(), torch.tensor([0.0, 2.0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"betas": (0.9, 1.0)}, r"betas = \(0.9, 1.0\)"),
        ({"clamp_weight_norm": 0.0}, "clamp_weight_norm = 0.0"),
        ({"eps": -1e-6}, "eps = -1e-06"),
        ({"lr": -0.1}, "lr = -0.1"),
    ],
)
def test_illegal_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        LAMB(parameters([torch.ones(2)]), **{"lr": 0.1, **options})
