from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bigbatch.tasks import ResNetSmall


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_by_hand():
    stem, head = 16 * 9 + 2 * 16, 64 * 10 + 10
    first = 2 * 16 * 16 * 9 + 2 * 2 * 16
    second = 16 * 32 * 9 + 32 * 32 * 9 + 2 * 2 * 32 + 16 * 32
    third = 32 * 64 * 9 + 64 * 64 * 9 + 2 * 2 * 64 + 32 * 64
    assert count(ResNetSmall(shape=(1, 28, 28), classes=10)) == stem + first + second + third + head == 77_562
    deeper = ResNetSmall(shape=(1, 28, 28), classes=10, blocks=2)
    assert count(deeper) == 77_562 + sum(2 * w * w * 9 + 4 * w for w in (16, 32, 64))
    assert count(ResNetSmall(shape=(3, 32, 32), classes=5, widths=[8])) == 3 * 8 * 9 + 16 + 2 * 8 * 8 * 9 + 32 + 45


@pytest.mark.parametrize("side", [8, 15, 16, 28, 32])
@pytest.mark.parametrize("blocks", [1, 3])
def test_forward_of_every_size(side, blocks):
    model = ResNetSmall(shape=(2, side, side), classes=7, widths=(4, 8, 8, 12), blocks=blocks)
    assert model(torch.randn(3, 2, side, side)).shape == (3, 7)


@pytest.mark.parametrize(
    ("shape", "option", "stride"),
    [
        ((1, 8, 8), "auto", 1),
        ((1, 15, 40), "auto", 1),
        ((1, 16, 16), "auto", 2),
        ((1, 28, 28), 1, 1),
        ((1, 8, 8), 3, 3),
    ],
)
def test_stem_stride(shape, option, stride):
    assert ResNetSmall(shape=shape, classes=10, stem_stride=option).conv.stride == (stride, stride)


def test_resolution_halves_after_the_first_width():
    model = ResNetSmall(shape=(1, 28, 28), classes=10, blocks=2)
    sizes = []
    x = model.conv(torch.zeros(1, 1, 28, 28))
    for block in model.stages:
        x = block(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(16, 14, 14)] * 2 + [(32, 7, 7)] * 2 + [(64, 4, 4)] * 2


def test_forward_equals_the_formula():
    torch.manual_seed(0)
    model = ResNetSmall(shape=(1, 8, 8), classes=3, widths=(4, 6)).double()
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)

    def norm(x, layer):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + layer.eps).sqrt() * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

    h = norm(F.conv2d(x, model.conv.weight, padding=1), model.norm).relu()
    a, b = model.stages
    f = norm(F.conv2d(h, a.conv1.weight, padding=1), a.norm1).relu()
    h = (norm(F.conv2d(f, a.conv2.weight, padding=1), a.norm2) + h).relu()
    f = norm(F.conv2d(h, b.conv1.weight, stride=2, padding=1), b.norm1).relu()
    h = (norm(F.conv2d(f, b.conv2.weight, padding=1), b.norm2) + F.conv2d(h, b.shortcut.weight, stride=2)).relu()
    expected = h.mean((2, 3)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_no_bias_stands_before_a_norm():
    model = ResNetSmall(shape=(1, 28, 28), classes=10, blocks=2)
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))


def test_initial_weights():
    torch.manual_seed(0)
    model = ResNetSmall(shape=(3, 32, 32), classes=200, widths=(64, 128))
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        n = conv.weight.numel()
        assert abs(conv.weight.std() / math.sqrt(2 / fan_out) - 1) < 4 / math.sqrt(2 * n)
    assert abs(model.head.weight.std() * model.head.in_features**0.5 - 1) < 4 / math.sqrt(2 * model.head.weight.numel())
    assert not model.head.bias.any()


def test_zeroed_last_norm_makes_the_branch_vanish():
    model = ResNetSmall(shape=(1, 8, 8), classes=10)
    block = model.stages[0]
    block.zero_init_last()
    assert not block.norm2.weight.any() and (block.norm1.weight == 1).all()
    x = torch.randn(4, 16, 8, 8).relu()
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    "options",
    [{"widths": w} for w in ([], (), [16, 0], [16, -1], [16.0], ["16"], [True], 16, "16", None)]
    + [{"stem_stride": s} for s in (0, -1, 1.5, "two", True, None)]
    + [{"blocks": b} for b in (0, 1.0, "1", True, None, [1, 2])],
)
def test_options_that_make_no_network(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"^{name} = .*: give "):
        ResNetSmall(shape=(1, 28, 28), classes=10, **options)
