from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigbatch.dropout import KeyedDropout, draws_freely

CPU = torch.device("cpu")
STEP = range(100, 106)

CASES = {
    "dropout": (nn.Dropout(0.3), (6, 5, 7)),
    "function": (lambda x: F.dropout(x, 0.3, training=True), (6, 5)),
    "channels": (nn.Dropout2d(0.3), (6, 5, 3, 3)),
    "volumes": (nn.Dropout3d(0.3), (6, 5, 2, 2, 2)),
    "path": (timm.layers.DropPath(0.3), (6, 4, 2)),
    "unscaled path": (timm.layers.DropPath(0.3, scale_by_keep=False), (6, 4)),
    "parts of a sample": (lambda x: F.dropout(x.flatten(0, 1), 0.3).view_as(x), (6, 4, 3)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3), (6, 2, 4, 3)),
    "twice": (nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.2)), (6, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mask_belongs_to_a_place_in_the_stream(name: str) -> None:
    layer, shape = CASES[name]
    keyed, x = KeyedDropout(7), torch.rand(shape, dtype=torch.float64)
    with keyed.at(range(100, 106), STEP):
        whole = layer(x)
    parts = []
    for low, high in ((0, 1), (1, 4), (4, 6)):
        with keyed.at(range(100 + low, 100 + high), STEP):
            parts.append(layer(x[low:high]))
    assert torch.equal(torch.cat(parts), whole)
    with keyed.at(range(106, 112), range(106, 112)):
        assert not torch.equal(layer(x), whole)
    with KeyedDropout(8).at(range(100, 106), STEP):
        assert not torch.equal(layer(x), whole)
    with keyed.at(range(100, 106), STEP):
        assert not draws_freely(lambda: layer(x), CPU)


def test_kept_share_scale_and_gradient_are_dropouts() -> None:
    x = torch.ones(64, 3001, requires_grad=True)
    with KeyedDropout(0).at(range(64), range(64)):
        y = F.dropout(x, 0.25)
        channels = F.dropout2d(torch.ones(64, 500, 2, 2), 0.25)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    share = (y > 0).double().mean().item()
    assert share == pytest.approx(0.75, abs=5 * (0.25 * 0.75 / x.numel()) ** 0.5)
    # Neighbouring samples and elements are unrelated.
    kept = (y > 0).double() - share
    for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
        assert abs((a * b).mean().item()) < 5 * 0.1875 / a.numel() ** 0.5
    assert torch.equal(channels, channels[..., :1, :1].expand_as(channels))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_all_none_and_evaluation() -> None:
    x = torch.rand(4, 50)
    with KeyedDropout(0).at(range(4), range(4)):
        assert not F.dropout(x, 1.0).any()
        assert torch.equal(F.dropout(x, 0.0), x)
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
        assert torch.empty(4, 50).bernoulli_(1.0).all()
        again = x.clone()
        assert F.dropout(again, 0.5, inplace=True) is again and not torch.equal(again, x)
    assert not torch.equal(F.dropout(x, 0.5), F.dropout(x, 0.5))  # outside it is torch's own


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_attention_is_torchs_but_for_the_mask(mask: str) -> None:
    q, k, v = (torch.rand(2, 4, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    options: dict[str, object] = {"is_causal": mask == "causal", "scale": 0.3}
    if mask in ("bool", "float"):
        allowed = torch.rand(2, 1, 5, 5).lt(0.7) | torch.eye(5, dtype=torch.bool)
        options["attn_mask"] = allowed if mask == "bool" else allowed.double().log()

    def attend(p: float) -> tuple[Tensor, ...]:
        with KeyedDropout(0).at(range(2), range(2)):
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, **options)  # type: ignore[arg-type]
        return y, *torch.autograd.grad(y.square().sum(), (q, k, v))

    # So rare a dropout drops nothing here, but takes our path.
    for ours, theirs in zip(attend(1e-12), attend(0.0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_draws_of_a_forward_pass_are_unrelated() -> None:
    """Layers of one shape, and channels after elements, do not repeat each other's masks."""
    x = torch.ones(16, 2000)
    with KeyedDropout(0).at(range(16), range(16)):
        first, second, path = (F.dropout(x, 0.5), F.dropout(x, 0.5), torch.empty(16, 2000).bernoulli_(0.5))
    for a, b in ((first, second), (first, path), (second, path)):
        agree = ((a > 0) == (b > 0)).double().mean().item()
        assert agree == pytest.approx(0.5, abs=5 * 0.5 / x.numel() ** 0.5)


def bias(samples: int) -> Tensor:
    """A table that a batch shares, dropped, then one draw of each sample; 16 rows are a multiple of 2, not of 3."""
    table = F.dropout(torch.ones(16, 4), 0.5)
    row = torch.empty(1).bernoulli_(0.5)
    return torch.cat([table.flatten(), row, F.dropout(torch.ones(samples, 4), 0.5).flatten()])


def test_what_a_batch_shares_has_one_mask_for_the_step() -> None:
    keyed = KeyedDropout(3)
    keyed.learn(bias)
    with keyed.at(STEP, STEP):
        whole = bias(6)
    for piece in (range(100, 102), range(102, 105), range(105, 106), range(106, 106)):
        with keyed.at(piece, STEP):
            part = bias(max(len(piece), 1))
        assert torch.equal(part[:65], whole[:65])
        first, last = (65 + 4 * (at - 100) for at in (piece.start, piece.stop))
        assert torch.equal(part[65 : 65 + last - first], whole[first:last])
    with keyed.at(range(106, 112), range(106, 112)):
        assert not torch.equal(bias(6)[:65], whole[:65])


def test_what_cannot_be_keyed_is_told() -> None:
    with KeyedDropout(0).at(range(4), range(4)), pytest.raises(ValueError, match=r"task\.dropout=torch"):
        F.dropout(torch.ones(3, 4), 0.5)
    state = torch.get_rng_state()
    with KeyedDropout(0).at(range(2), range(2)):
        assert draws_freely(lambda: torch.rand(3), CPU)
        assert draws_freely(lambda: nn.AlphaDropout()(torch.ones(2)), CPU)
        assert not draws_freely(lambda: torch.ones(3), CPU)
    assert torch.equal(state, torch.get_rng_state())


def test_attention_in_half_precision_and_of_what_sees_nothing() -> None:
    q = torch.full((1, 1, 2, 64), 40.0, dtype=torch.half)
    nobody = torch.tensor([[True, True], [False, False]])
    with KeyedDropout(0).at(range(1), range(1)):
        assert F.scaled_dot_product_attention(q, q, q, dropout_p=1e-9).isfinite().all()
        x = torch.rand(1, 1, 2, 3, requires_grad=True)
        y = F.scaled_dot_product_attention(x, x, x, attn_mask=nobody, dropout_p=1e-9)
    assert not y[..., 1, :].any() and y[..., 0, :].all()
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_models_of_timm_are_covered(name: str) -> None:
    options = {"img_size": 32, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=4, drop_rate=0.2, drop_path_rate=0.2, **options)
    images = torch.rand(2, 3, 32, 32)
    assert draws_freely(lambda: model(images), CPU)
    keyed = KeyedDropout(0)
    with keyed.at(range(2), range(2)):
        assert not draws_freely(lambda: model(images), CPU)
