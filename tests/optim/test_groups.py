from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigbatch.config.models import GroupRule
from bigbatch.optim import parameter_groups


def rules(*matches, **options):
    return [GroupRule(match=match, **options) for match in matches]


def names(groups):
    return {group["match"]: group["param_names"] for group in groups}


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_default_is_bias_and_norm_without_decay_or_adaptation_then_the_rest():
    model = small()
    special, rest = parameter_groups(model, rules=None, weight_decay=0.01)
    assert special["param_names"] == ["0.bias", "1.weight", "1.bias", "3.bias"]
    assert (special["weight_decay"], special["adapt"], special["lr_scale"]) == (0.0, False, 1.0)
    assert rest["param_names"] == ["0.weight", "3.weight"]
    assert (rest["weight_decay"], rest["adapt"], rest["lr_scale"]) == (0.01, True, 1.0)
    assert rest["params"][0] is model[0].weight


def test_defaults_own_empty_group_is_left_out():
    assert names(parameter_groups(nn.Linear(2, 2, bias=False))) == {"rest": ["weight"]}
    assert names(parameter_groups(nn.LayerNorm(2))) == {"bias_and_norm": ["weight", "bias"]}


class ChannelRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 4, 1, 1))


class Renamed(nn.LayerNorm):
    pass


class ScaledNormalization(ChannelRMSNorm):
    pass


class NormalizedLinear(nn.Linear):
    pass


class NormHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.biased = nn.Parameter(torch.zeros(9, 2))


def test_what_counts_as_bias_and_norm():
    model = nn.ModuleDict(
        {
            "own_norm": ChannelRMSNorm(),
            "normalization": ScaledNormalization(),
            "subclass": Renamed((2, 4)),
            "linear": NormalizedLinear(4, 4),
            "head": NormHead(),
            "attention": Attention(),
            "scale": nn.ParameterList([nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(3))]),
            "lstm": nn.LSTM(2, 2),
        }
    )
    found = names(parameter_groups(model))
    assert set(found["rest"]) == {
        "linear.weight", "head.fc.weight", "attention.biased", "lstm.weight_ih_l0", "lstm.weight_hh_l0",
    }  # fmt: skip
    assert "own_norm.gain" in found["bias_and_norm"] and "normalization.gain" in found["bias_and_norm"]
    assert "attention.relative_position_bias_table" in found["bias_and_norm"]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_timm_models_leave_only_matrices_and_embeddings_to_the_rest(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    special, rest = parameter_groups(model)
    assert len(special["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert all(p.ndim >= 2 for p in rest["params"])
    assert not any("norm" in name or "bn" in name or name.endswith("bias") for name in rest["param_names"])


def test_first_rule_that_matches_wins_and_options_are_taken_over():
    groups = parameter_groups(
        small(),
        rules=[
            GroupRule(match=r"^3\.", lr_scale=0.1, weight_decay=0.5, adapt=False),
            GroupRule(match="weight"),
            *rules("bias_and_norm", weight_decay=0.0),
        ],
        weight_decay=0.01,
    )
    assert names(groups) == {
        r"^3\.": ["3.weight", "3.bias"], "weight": ["0.weight", "1.weight"], "bias_and_norm": ["0.bias", "1.bias"],
    }  # fmt: skip
    assert [g["weight_decay"] for g in groups] == [0.5, 0.01, 0.0]
    assert [g["lr_scale"] for g in groups] == [0.1, 1.0, 1.0]
    assert [g["adapt"] for g in groups] == [False, True, True]


def test_shared_parameters_are_claimed_once_by_any_of_their_names():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    assert names(parameter_groups(model, rules=rules("embed", "rest"))) == {
        "embed": ["embed.weight"], "rest": ["body.weight", "body.bias"],
    }  # fmt: skip
    assert names(parameter_groups(model, rules=rules("head", "rest")))["head"] == ["embed.weight"]
    with pytest.raises(ValueError, match=r"optim\.groups\[1\]\.match = 'embed'"):
        parameter_groups(model, rules=rules("head", "embed", "rest"))


def test_frozen_parameters_are_left_out():
    model = small()
    model[0].requires_grad_(False)
    assert names(parameter_groups(model))["rest"] == ["3.weight"]
    with pytest.raises(ValueError, match=r"'\^0\\\\\.'"):
        parameter_groups(model, rules=rules(r"^0\.", "rest"))
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        parameter_groups(model.requires_grad_(False))


@pytest.mark.parametrize(
    "matches, message",
    [
        (["encoder", "rest"], r"groups\[0\]\.match = 'encoder': matches no parameter of those left, such as 0\.weight"),
        (["rest", "weight"], r"optim\.groups\[1\]\.match = 'weight': matches no parameter, the rules before it"),
        (["weight", "bias", "rest"], r"optim\.groups\[2\]\.match = 'rest'"),
        (["weight", "bias", "bias_and_norm"], r"optim\.groups\[2\]\.match = 'bias_and_norm'"),
        (["bias_and_norm"], r"no rule for 0\.weight, 3\.weight; add the rule \{match: rest\}"),
        (["(", "rest"], r"optim\.groups\[0\]\.match = '\(': not a regular expression"),
    ],
)
def test_rules_that_do_not_fit_are_named(matches, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(small(), rules=rules(*matches))


def test_no_rules_at_all_is_not_the_default():
    with pytest.raises(ValueError, match=r"no rule for 0\.weight, 0\.bias, 1\.weight, 1\.bias and 2 more"):
        parameter_groups(small(), rules=[])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["weight", "bias", "bias_and_norm", "rest", r"^0\.", r"^3\.", r"^[13]"]), max_size=5))
def test_every_parameter_is_claimed_exactly_once_or_it_is_an_error(matches):
    model = small()
    try:
        groups = parameter_groups(model, rules=rules(*matches))
    except ValueError as error:
        assert "optim.groups" in str(error)
        return
    assert len(groups) == len(matches)
    claimed = [name for group in groups for name in group["param_names"]]
    assert sorted(claimed) == sorted(name for name, _ in model.named_parameters())
    for group in groups:
        assert all(model.get_parameter(n) is p for n, p in zip(group["param_names"], group["params"], strict=True))
