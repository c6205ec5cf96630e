"""The pitfalls of Goyal et al. 2017 (arXiv:1706.02677) that concern the optimiser, each shown to bite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bigbatch.config.models import SGD
from bigbatch.optim import LARS, build_optimizer, parameter_groups
from optim.problems import assert_equal, parameters, problem, train

KAPPA = 8.0


def one_step(kind, w, g, lr, **options):
    p = nn.Parameter(w.clone())
    train(kind([p], lr, **options), [p], [[g]], [lr])
    return p.detach()


def test_scaling_the_loss_is_not_scaling_the_rate_once_there_is_weight_decay():
    """Remark 1. κ·loss: w − γ(κg + βw); κ·rate: w − κγ(g + βw). They differ by (κ−1)γβw, and only then."""
    (w,), ((g,),) = problem(1, shapes=[(4, 3)])
    gamma = 0.1
    for beta in (0.0, 0.3):
        loss = one_step(torch.optim.SGD, w, KAPPA * g, gamma, weight_decay=beta)
        rate = one_step(torch.optim.SGD, w, g, KAPPA * gamma, weight_decay=beta)
        assert_equal([loss - rate], [(KAPPA - 1) * gamma * beta * w])


@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_scaling_the_loss_does_nothing_to_lars_without_decay_and_bends_it_with(placement):
    (w,), ((g,),) = problem(1, shapes=[(4, 3)])
    step = {
        (kappa, beta): one_step(LARS, w, kappa * g, 0.5, weight_decay=beta, lr_placement=placement) - w
        for kappa in (1.0, KAPPA) for beta in (0.0, 0.3)
    }  # fmt: skip
    assert_equal([step[KAPPA, 0.0]], [step[1.0, 0.0]])
    assert (step[KAPPA, 0.3] - step[1.0, 0.3]).norm() > 0.1 * step[1.0, 0.3].norm()
    doubled = one_step(LARS, w, g, 1.0, weight_decay=0.3, lr_placement=placement) - w
    assert_equal([doubled], [2 * step[1.0, 0.3]])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adapt", [False, True])
def test_momentum_correction_makes_inside_equal_outside_when_the_rate_changes(adapt, nesterov):
    """Remark 2."""
    weights, gradients = problem(50)
    lrs = [0.1] * 10 + [0.8] * 20 + [0.08] * 20
    results = {}
    for name, options in {
        "inside": {"lr_placement": "inside"},
        "corrected": {"lr_placement": "inside", "momentum_correction": True},
        "outside": {"lr_placement": "outside"},
    }.items():
        params = parameters(weights)
        optimizer = LARS(params, 0.1, weight_decay=0.01, adapt=adapt, nesterov=nesterov, **options)
        results[name] = train(optimizer, params, gradients, lrs)
    assert_equal(results["corrected"], results["outside"])
    assert (results["inside"][0] - results["outside"][0]).norm() > 1e-3 * results["outside"][0].norm()
    if not adapt:
        params = parameters(weights)
        sgd = torch.optim.SGD(params, 0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
        assert_equal(results["corrected"], train(sgd, params, gradients, lrs))


def test_without_correction_a_raised_rate_meets_a_momentum_that_is_kappa_times_too_small():
    w, g = torch.tensor([0.0]), torch.tensor([1.0])
    moved = {}
    for corrected in (False, True):
        p = nn.Parameter(w.clone())
        optimizer = LARS([p], 0.1, adapt=False, momentum_correction=corrected)
        train(optimizer, [p], [[g]], [0.1])
        before = p.item()
        train(optimizer, [p], [[0 * g]], [0.1 * KAPPA])
        moved[corrected] = p.item() - before
    assert moved[True] == pytest.approx(KAPPA * moved[False])
    assert moved[False] == pytest.approx(-0.9 * 0.1)


def test_decay_stays_off_norm_parameters_and_biases():
    """Section 5.1 of the paper decays no batch norm parameter; a zero gradient shows decay alone."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    nn.init.constant_(model[1].bias, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(SGD(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.5), model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if name in ("0.weight", "4.weight") else 1.0
        assert_equal([p], [factor * before[name]], 1e-6)


def test_layer_wise_rates_stay_off_norm_parameters_and_biases():
    special, rest = parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), weight_decay=0.1)
    optimizer = LARS([special, rest], 0.5, momentum=0.0)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in special["params"]]
    optimizer.step()
    assert_equal(special["params"], [w - 0.5 for w in before], 1e-6)
