"""Conversion keeps what a batch norm had, and refuses what it cannot do."""

import copy

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from bigbatch.config.models import Norm
from bigbatch.norm import BatchStats, SpanBatchNorm, convert_norm

torch.set_num_threads(1)


def alone(count: int):
    raise AssertionError(f"asked for {count} neighbours")


def convert(model: nn.Module, micro: int = 8, neighbours=alone, **norm) -> nn.Module:
    return convert_norm(model, norm=Norm(**norm), micro=micro, neighbours=neighbours)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8, eps=1e-3, momentum=0.2),
        nn.Sequential(nn.Flatten(), nn.Linear(128, 4), nn.BatchNorm1d(4, affine=False)),
    )
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    return model.double()


def images(n: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_state_dicts_go_round() -> None:
    before = network()
    before(images())
    ours = convert(copy.deepcopy(before))
    assert [type(ours[1]), type(ours[2][2])] == [SpanBatchNorm] * 2
    assert (ours[1].eps, ours[1].momentum, ours[1].span, ours[2][2].affine) == (1e-3, 0.2, 8, False)
    torch.testing.assert_close(dict(ours.state_dict()), dict(before.state_dict()), rtol=0, atol=0)
    for _ in range(3):
        torch.testing.assert_close(ours(images()), before(images()), rtol=1e-12, atol=1e-12)
        BatchStats(ours).commit(8)
    back = network()
    back.load_state_dict(ours.state_dict())
    torch.testing.assert_close(back.eval()(images()), before.eval()(images()), rtol=1e-12, atol=1e-12)


def test_parameters_are_the_same_objects_and_modes_stay() -> None:
    model = network()
    model[1].eval()
    parameters = list(model.parameters())
    ours = convert(model)
    assert ours is model and all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert not ours[1].training and ours[2][2].training
    assert ours[1].pending_mean.dtype == torch.float64
    again = convert(ours, span=4)
    assert again[1].span == 4 and again[1].weight is parameters[1]


def test_shared_and_outermost_layers() -> None:
    shared = nn.BatchNorm2d(3)
    model = convert(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert isinstance(model["a"], SpanBatchNorm) and model["a"] is model["b"][0]
    assert isinstance(convert(nn.BatchNorm1d(3)), SpanBatchNorm)
    assert isinstance(convert(nn.SyncBatchNorm(3)), SpanBatchNorm)


def test_neighbours_are_asked_for_once_and_only_when_needed() -> None:
    calls: list[int] = []

    def neighbours(count: int):
        calls.append(count)
        return lambda tensor: None

    model = convert(network(), span=24, neighbours=neighbours)
    assert calls == [3] and model[1].reduce is model[2][2].reduce
    for span in (1, 2, 4, 8, "micro"):
        assert convert(network(), span=span)[1].reduce is None


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_timms_drop_and_activation_follow(kind: str) -> None:
    old = BatchNormAct2d(6, act_layer=nn.SiLU, drop_layer=nn.Dropout).double()
    nn.init.normal_(old.weight)
    new = convert(nn.Sequential(copy.deepcopy(old)), kind=kind, groups=2)[0]
    x = images(channels=6)
    torch.manual_seed(3)
    normal = nn.BatchNorm2d.forward(old, x) if kind == "batch" else F.group_norm(x, 2, old.weight, old.bias, old.eps)
    expected = old.act(old.drop(normal))
    torch.manual_seed(3)
    torch.testing.assert_close(new(x), expected, rtol=1e-12, atol=1e-12)
    names = [name for name in old.state_dict() if kind == "batch" or name in ("weight", "bias")]
    assert list(new.state_dict()) == names


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "resnetv2_18"])
def test_timm_models_train_alike(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.0).double()
    ours = convert(copy.deepcopy(model), micro=4)
    assert not any(type(m).__name__.startswith("BatchNorm") for m in ours.modules())
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-9, atol=1e-9)
    BatchStats(ours).commit(4)
    torch.testing.assert_close(dict(ours.state_dict()), dict(model.state_dict()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("norm", "theirs"),
    [
        ({"kind": "group", "groups": 4}, nn.GroupNorm(4, 8)),
        ({"kind": "group", "groups": 100}, nn.GroupNorm(8, 8)),
        ({"kind": "layer"}, nn.GroupNorm(1, 8)),
        ({"kind": "layer"}, nn.LayerNorm([8, 4, 4])),
        ({"kind": "instance"}, nn.InstanceNorm2d(8)),
    ],
)
def test_other_kinds_are_torchs(norm: dict[str, object], theirs: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm2d(8, eps=1e-3)).double()
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[0].bias)
    theirs = theirs.double()
    theirs.eps = 1e-3
    weight, bias = (p.detach()[:, None, None] for p in model[0].parameters())
    ours = convert(model, **norm)
    assert type(ours[0]) is nn.GroupNorm and [name for name, _ in ours.named_parameters()] == ["0.weight", "0.bias"]
    x = torch.randn(5, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x) * weight + bias, rtol=1e-12, atol=1e-12)
    assert "affine=False" in str(convert(nn.BatchNorm2d(8, affine=False), **norm))


@given(micro=st.integers(1, 64), span=st.integers(1, 200))
def test_spans_are_divisors_or_multiples(micro: int, span: int) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    if micro % span == 0 or span % micro == 0:
        convert(model, micro=micro, neighbours=lambda q: lambda tensor: None, span=span)
        return
    with pytest.raises(ValueError, match=rf"^norm\.span = {span}: .*micro batch of {micro}") as error:
        convert(model, micro=micro, span=span)
    proposed = int(str(error.value).rpartition(" ")[2])
    legal = [s for s in range(1, 400) if micro % s == 0 or s % micro == 0]
    assert abs(proposed - span) == min(abs(s - span) for s in legal)


class Odd(nn.BatchNorm2d):
    """A batch norm that may mean anything."""


@pytest.mark.parametrize(
    ("model", "norm", "message"),
    [
        (nn.Linear(2, 2), {"kind": "group"}, r"norm\.kind = group: the model has no batch norm"),
        (nn.Linear(2, 2), {"span": 4}, r"norm\.span = 4: the model has no batch norm"),
        (nn.BatchNorm2d(8), {"kind": "layer", "span": 4}, r"norm\.span = 4: norm\.kind layer has no span"),
        (
            nn.Sequential(nn.BatchNorm2d(24), nn.BatchNorm2d(36)),
            {"kind": "group", "groups": 32},
            r"norm\.groups = 32: .*36 channels; use one of \[1, 2, 3, 4, 6, 12, 36\]",
        ),
        (nn.Sequential(Odd(3)), {}, "0: Odd: not a batch norm whose meaning is known"),
        (nn.BatchNorm2d(3, momentum=None), {}, "a number as momentum"),
        (nn.BatchNorm2d(3, track_running_stats=False), {}, "track_running_stats=True"),
    ],
)
def test_settings_that_cannot_be_met(model: nn.Module, norm: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(model, **norm)


def test_a_model_without_batch_norm_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert convert(model) is model
