"""timm's Lars and Lamb and pytorch_optimizer's LARS and Lamb: equal where they mean the same; where not, how far apart.

In float64, on matrices unless a test says otherwise. A distance is ‖ours − theirs‖/‖theirs − start‖ over all weights.
"""

from __future__ import annotations

import pytest
import torch

from bigbatch.optim import LAMB, LARS
from optim.problems import parameters, problem, rates, train

Lars = pytest.importorskip("timm.optim.lars").Lars
Lamb = pytest.importorskip("timm.optim.lamb").Lamb
other = pytest.importorskip("pytorch_optimizer")

STEPS = 50
MATRICES = ((4, 3), (2, 3, 2, 2), (3, 2))


def distance(ours, theirs, *, shapes=MATRICES, lrs=None, change=None, steps=STEPS):
    """Train both from the same weights on the same gradients; ``change`` edits weights and gradients first."""
    weights, gradients = problem(steps, shapes=shapes)
    weights = [w + 0.5 for w in weights]
    gradients = [[g + 0.1 for g in gradient] for gradient in gradients]
    if change:
        change(weights, gradients)
    ends = []
    for build in (ours, theirs):
        params = parameters(weights)
        train(build(params), params, gradients, lrs or rates(steps, 0.05))
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    start = torch.cat([w.flatten() for w in weights])
    return ((ends[0] - ends[1]).norm() / (ends[1] - start).norm()).item()


SAME, ROUNDING = 1e-12, 1e-10


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_timm_lars_is_ours_outside_with_always_adapt(weight_decay, clip, nesterov):
    same = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    assert distance(
        lambda p: LARS(p, 1.0, lr_placement="outside", clip_ratio=clip, trust_coefficient=0.02, **same),
        lambda p: Lars(p, 1.0, eps=0.0, always_adapt=True, trust_clip=clip, trust_coeff=0.02, **same),
    ) < SAME  # fmt: skip


def test_timm_lars_does_not_adapt_at_weight_decay_zero():
    """It then is SGD, 1/λ times our layer rate: a different method (630 distances here)."""
    ours = distance(
        lambda p: Lars(p, 1.0, momentum=0.9, eps=0.0),
        lambda p: LARS(p, 1.0, lr_placement="outside"),
    )
    assert ours == pytest.approx(630, rel=0.1)
    assert distance(
        lambda p: LARS(p, 1.0, lr_placement="outside", adapt=False), lambda p: Lars(p, 1.0, momentum=0.9)
    ) < SAME  # fmt: skip


def test_timm_lars_has_the_rate_outside_only():
    """With a changing rate the paper's placement ends elsewhere, by 22 % on this schedule."""
    lag = distance(
        lambda p: LARS(p, 1.0, weight_decay=0.05),
        lambda p: Lars(p, 1.0, momentum=0.9, eps=0.0, weight_decay=0.05),
    )
    assert lag == pytest.approx(0.217, rel=0.1)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("foreach", [False, True])
def test_pytorch_optimizer_lars_is_ours_outside_on_matrices(weight_decay, nesterov, foreach):
    same = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay, "trust_coefficient": 0.02}
    assert distance(
        lambda p: LARS(p, 1.0, lr_placement="outside", **same), lambda p: other.LARS(p, 1.0, foreach=foreach, **same)
    ) < SAME  # fmt: skip


def test_pytorch_optimizer_lars_treats_vectors_as_sgd_without_decay_by_itself():
    """We leave that to the groups; adapt=False and weight decay 0 there gives the same."""
    shapes = ((5,), (3,))
    same = {"momentum": 0.9, "weight_decay": 0.05}

    def theirs(p):
        return other.LARS(p, 1.0, **same)

    assert distance(lambda p: LARS(p, 1.0, lr_placement="outside", **same), theirs, shapes=shapes) == pytest.approx(
        0.999, rel=0.01
    )
    plain = distance(lambda p: LARS(p, 1.0, lr_placement="outside", adapt=False), theirs, shapes=shapes)
    assert plain < SAME


def test_pytorch_optimizer_lars_moves_a_weight_without_gradient_at_trust_over_decay():
    """At ‖g‖ = 0 its λ is η/β where ours and timm's is 1: the decay step is β/η = 50 times smaller."""

    def no_gradient(weights, gradients):
        for gradient in gradients:
            for g in gradient:
                g.zero_()

    same = {"momentum": 0.0, "weight_decay": 0.05}

    def ours(p):
        return LARS(p, 1.0, lr_placement="outside", **same)

    apart = distance(ours, lambda p: other.LARS(p, 1.0, **same), change=no_gradient, steps=1)
    assert apart == pytest.approx(0.05 / 0.001 - 1)
    assert distance(ours, lambda p: Lars(p, 1.0, eps=0.0, **same), change=no_gradient, steps=1) < SAME


def test_pytorch_optimizer_lars_writes_into_the_gradients_and_ours_does_not():
    for build, changed in ((other.LARS, True), (LARS, False)):
        p = torch.nn.Parameter(torch.ones(2, 2))
        p.grad = torch.full((2, 2), 3.0)
        build([p], 1.0).step()
        assert (p.grad != 3.0).any().item() is changed


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_timm_lamb_without_its_norm_limit_is_ours(weight_decay, bias_correction):
    same = {"bias_correction": bias_correction, "weight_decay": weight_decay}
    assert distance(
        lambda p: LAMB(p, 1.0, **same), lambda p: Lamb(p, 1.0, max_grad_norm=None, always_adapt=True, **same)
    ) < ROUNDING  # fmt: skip


def test_timm_lamb_divides_long_gradients_by_default_and_never_short_ones():
    """Its max_grad_norm=1 is our prenormalize while the global norm is above 1; below, it divides by nothing."""

    def short(weights, gradients):
        for gradient in gradients:
            for g in gradient:
                g.mul_(1e-3)

    def theirs(p):
        return Lamb(p, 1.0, always_adapt=True, weight_decay=0.05, eps=0.01)

    def ours(prenormalize):
        return lambda p: LAMB(p, 1.0, weight_decay=0.05, eps=0.01, prenormalize=prenormalize)

    assert distance(ours(True), theirs) < ROUNDING
    assert distance(ours(False), theirs) == pytest.approx(0.169, rel=0.1)
    assert distance(ours(False), theirs, change=short) < ROUNDING
    assert distance(ours(True), theirs, change=short) == pytest.approx(0.924, rel=0.1)


def test_timm_lamb_does_not_adapt_at_weight_decay_zero():
    """It then is Adam with a norm limit, and so is ours where told not to adapt."""

    def theirs(p):
        return Lamb(p, 1.0, max_grad_norm=None, weight_decay=0.0)

    assert distance(lambda p: LAMB(p, 1.0, adapt=False), theirs) < ROUNDING
    assert distance(lambda p: LAMB(p, 1.0), theirs) == pytest.approx(1.82, rel=0.1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_pytorch_optimizer_lamb_is_ours_uncorrected_with_clamp_up_to_its_second_eps(weight_decay):
    """Its ratio is φ/(‖u‖ + ε) where the paper and we have φ/‖u‖: 1.6e-7 of the distance, not rounding."""
    apart = distance(
        lambda p: LAMB(p, 1.0, bias_correction=False, clamp_weight_norm=10.0, weight_decay=weight_decay),
        lambda p: other.Lamb(p, 1.0, adam_debias=True, weight_decouple=False, weight_decay=weight_decay),
    )
    assert apart == pytest.approx(1.65e-7, rel=0.1)


def test_pytorch_optimizer_lamb_differs_by_default():
    """Each on its own: decay taken before the norms, 1/(1 − β₁ᵗ) on the rate after the ratio, ‖w‖ clamped at 10."""

    def long_weights(weights, gradients):
        for w in weights:
            w.mul_(30 / w.norm())

    def ours(**options):
        return lambda p: LAMB(p, 1.0, bias_correction=False, weight_decay=0.05, **options)

    def theirs(**options):
        return lambda p: other.Lamb(
            p, 1.0, weight_decay=0.05, **{"adam_debias": True, "weight_decouple": False, **options}
        )

    assert distance(ours(), theirs(weight_decouple=True)) == pytest.approx(0.041, rel=0.1)
    assert distance(ours(), theirs(adam_debias=False)) == pytest.approx(0.468, rel=0.1)
    assert distance(ours(), theirs(), change=long_weights) == pytest.approx(1.54, rel=0.1)
    assert distance(ours(clamp_weight_norm=10.0), theirs(), change=long_weights) < 1e-5
