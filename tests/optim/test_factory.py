from __future__ import annotations

import typing

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from bigbatch.config.models import Optim
from bigbatch.optim import LAMB, LARS, build_optimizer
from optim.problems import assert_equal

READ = TypeAdapter(Optim)
SECTIONS = {
    typing.get_args(s.model_fields["name"].annotation)[0]: s for s in typing.get_args(typing.get_args(Optim)[0])
}
CLASSES = {
    "sgd": torch.optim.SGD, "lars": LARS, "lamb": LAMB, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop,
    "adadelta": torch.optim.Adadelta, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam, "nadam": torch.optim.NAdam,
}  # fmt: skip
REST = [{"match": "rest"}]
# field: another legal value than the default, and what else it takes to have an effect
OTHER = {
    "lr": (0.3, {}),
    "weight_decay": (0.2, {}),
    "groups": ([{"match": "rest", "lr_scale": 0.5}], {}),
    "momentum": (0.5, {}),
    "dampening": (0.5, {}),
    "nesterov": (True, {"momentum": 0.9}),
    "trust_coefficient": (0.02, {}),
    "eps": (0.1, {}),
    "lr_placement": ("outside", {}),
    "momentum_correction": (True, {}),
    "denominator": ("joint", {"weight_decay": 0.5}),
    "clip_ratio": (True, {"lr": 1e-4}),
    "betas": ((0.5, 0.7), {}),
    "bias_correction": (False, {"groups": [{"match": "rest", "adapt": False}]}),
    "clamp_weight_norm": (0.1, {}),
    "prenormalize": (True, {"eps": 0.1}),
    "lr_decay": (0.5, {}),
    "initial_accumulator_value": (0.5, {}),
    "alpha": (0.5, {}),
    "centered": (True, {}),
    "rho": (0.5, {}),
    "amsgrad": (True, {}),
    "momentum_decay": (0.5, {}),
}


def model_of(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)


def run(config, steps=8):
    """Parameters after steps at a changing rate, with gradients that shrink (amsgrad and beta matter then)."""
    model = model_of()
    optimizer = build_optimizer(READ.validate_python(config), model)
    generator = torch.Generator().manual_seed(1)
    for t in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config["lr"] * group["lr_scale"] / (1 + t)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) / 10**t
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_every_section_is_in_this_table_and_builds_its_optimiser():
    assert set(SECTIONS) == set(CLASSES)
    for name, kind in CLASSES.items():
        assert type(build_optimizer(READ.validate_python({"name": name, "lr": 0.1}), model_of())) is kind


@pytest.mark.parametrize(
    "name, field", [(name, field) for name, s in SECTIONS.items() for field in s.model_fields if field != "name"]
)
def test_every_field_reaches_the_optimiser(name, field):
    value, needs = OTHER[field]
    base = {"name": name, "lr": 0.1, **{k: v for k, v in needs.items() if k in SECTIONS[name].model_fields}}
    base.setdefault("groups", REST)
    changed = {**base, field: value}
    optimizer = build_optimizer(READ.validate_python(changed), model_of())
    if field not in ("groups", "lr"):
        assert optimizer.defaults[field] == value
        assert all(group.get(field, value) == value for group in optimizer.param_groups)
    assert not torch.equal(run(base), run(changed))


@pytest.mark.parametrize("name", CLASSES)
def test_groups_rates_and_decay(name):
    rules = [{"match": "^0", "lr_scale": 0.25, "weight_decay": 0.5}, {"match": "rest", "adapt": False}]
    config = READ.validate_python({"name": name, "lr": 0.2, "weight_decay": 0.1, "groups": rules})
    first, rest = build_optimizer(config, model_of()).param_groups
    assert (first["lr"], first["lr_scale"], first["weight_decay"], first["adapt"]) == (0.05, 0.25, 0.5, True)
    assert (rest["lr"], rest["lr_scale"], rest["weight_decay"], rest["adapt"]) == (0.2, 1.0, 0.1, False)
    assert first["param_names"] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fused_on_contiguous_weights_of_the_cpu_and_equal_to_unfused(name, dtype):
    models = [model_of(dtype), model_of(dtype)]
    fused = build_optimizer(READ.validate_python({"name": name, "lr": 0.1, "weight_decay": 0.1}), models[0])
    assert all(group["fused"] for group in fused.param_groups)
    own = {k: v for k, v in fused.defaults.items() if k not in ("fused", "foreach", "decoupled_weight_decay")}
    groups = [
        {"params": [models[1].get_parameter(n) for n in g["param_names"]], "weight_decay": g["weight_decay"]}
        for g in fused.param_groups
    ]
    plain = CLASSES[name](groups, **own, foreach=False)
    for _ in range(3):
        for model, optimizer in zip(models, (fused, plain), strict=True):
            torch.manual_seed(2)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    assert_equal(list(models[0].parameters()), list(models[1].parameters()), tolerance)


def test_weights_in_another_layout_are_stepped_right():
    """torch's fused CPU kernels pair weights and gradients by memory order."""
    weight = torch.arange(48.0).reshape(2, 3, 4, 2)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = nn.Conv2d(3, 2, (4, 2), bias=False)
        model.weight = nn.Parameter(weight.clone(memory_format=layout))
        optimizer = build_optimizer(READ.validate_python({"name": "sgd", "lr": 0.1}), model)
        model.weight.grad = torch.arange(48.0).flip(0).reshape(2, 3, 4, 2)
        optimizer.step()
        results.append(model.weight.detach())
        assert bool(optimizer.defaults["foreach"]) is (layout is torch.channels_last)
    assert_equal(results[:1], results[1:], 0)


@pytest.mark.parametrize(
    "config, named",
    [
        ({"name": "sgd", "nesterov": True, "momentum": 0.0}, "optim.nesterov = True"),
        ({"name": "sgd", "nesterov": True, "dampening": 0.1}, "optim.nesterov = True"),
        ({"name": "sgd", "dampening": 0.1, "momentum": 0.0}, "optim.dampening = 0.1"),
        ({"name": "lars", "nesterov": True, "momentum": 0.0}, "optim.nesterov = True"),
        ({"name": "lars", "momentum_correction": True, "momentum": 0.0}, "optim.momentum_correction = True"),
        ({"name": "lars", "momentum_correction": True, "lr_placement": "outside"}, "optim.momentum_correction = True"),
        ({"name": "lamb", "groups": [{"match": "nowhere"}]}, r"^optim\.groups\[0\]\.match = 'nowhere'"),
    ],
)
def test_options_that_exclude_each_other_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        build_optimizer(READ.validate_python({"lr": 0.1, **config}), model_of())


def test_state_dicts_load_with_weights_only(tmp_path):
    for name in CLASSES:
        model = model_of()
        optimizer = build_optimizer(READ.validate_python({"name": name, "lr": 0.1}), model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / name)
        optimizer.load_state_dict(torch.load(tmp_path / name, weights_only=True))
        assert [g["match"] for g in optimizer.param_groups] == ["bias_and_norm", "rest"]
