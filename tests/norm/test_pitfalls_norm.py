"""Goyal et al. 2017 (arXiv:1706.02677) on batch norm: statistics per worker, residual branches that start as zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigbatch.config.models import Norm
from bigbatch.norm import convert_norm, zero_init_residual
from ranks import run_ranks

torch.set_num_threads(1)


SPANS = ("micro", 8, 4, 16)


def losses(rank: int) -> dict[int | str, list[Tensor]]:
    """By span, the loss of this rank's eight samples, before and after a change to one of the second rank."""
    import torch.distributed as dist

    x, label = (
        torch.randn(16, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.arange(16),
    )
    changed = x.clone()
    changed[15] += 5
    mine = slice(rank * 8, rank * 8 + 8)
    results: dict[int | str, list[Tensor]] = {}
    for span in SPANS:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16)
        ).double()
        model = convert_norm(model, norm=Norm(span=span), micro=8, neighbours=lambda count: dist.all_reduce)
        each = [nn.functional.cross_entropy(model(v[mine]), label[mine], reduction="none") for v in (x, changed)]
        results[span] = [loss.detach() for loss in each]
    return results


def test_a_samples_loss_depends_on_its_own_group_alone() -> None:
    """Section 2.3: per-worker statistics are part of the loss; with span 8 they are, at any number of workers."""
    first, second = run_ranks(2, losses)
    for span in SPANS:
        assert torch.equal(*first[span]) is (span != 16)
        assert not torch.equal(*second[span])
    before, after = second[4]
    assert torch.equal(before[:4], after[:4])


def small() -> nn.Module:
    from bigbatch.tasks.resnet_small import ResNetSmall

    return ResNetSmall(shape=(3, 16, 16), classes=4, blocks=2)


def by_timm(name: str, **options: bool) -> nn.Module:
    # The modules are slow to import, and the processes above do without.
    import timm

    return timm.create_model(name, **options)


def by_torchvision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)


MODELS = {
    "bigbatch": (small, "norm2.weight", 6),
    "timm": (lambda: by_timm("resnet18", zero_init_last=False), "bn2.weight", 8),
    "timm_zero_already": (lambda: by_timm("resnet50"), "bn3.weight", 16),
    "torchvision": (lambda: by_torchvision("resnet18"), "bn2.weight", 8),
    "torchvision_bottleneck": (lambda: by_torchvision("resnet50"), "bn3.weight", 16),
}


@pytest.mark.parametrize("kind", ["unconverted", "batch", "layer"])
@pytest.mark.parametrize("name", MODELS)
def test_last_gammas_are_zero(name: str, kind: str) -> None:
    """Section 5.1, before and after conversion."""
    make, suffix, blocks = MODELS[name]
    model = make()
    if kind != "unconverted":
        model = convert_norm(model, norm=Norm(kind=kind), micro=4, neighbours=lambda count: pytest.fail("alone"))
    weights = dict(model.named_parameters())
    ones = {n for n, p in weights.items() if p.dim() == 1 and bool((p == 1).all())}
    names = zero_init_residual(model)
    assert len(names) == len(set(names)) == blocks and all(n.endswith(suffix) for n in names)
    assert not any(bool(weights[n].any()) for n in names)
    assert all(bool((weights[n] == 1).all()) for n in ones - set(names))


def test_a_residual_network_starts_as_its_shortcuts() -> None:
    model = convert_norm(small(), norm=Norm(span=4), micro=8, neighbours=lambda count: pytest.fail("alone"))
    assert zero_init_residual(model)
    h = x = torch.relu(model.norm(model.conv(torch.randn(8, 3, 16, 16))))
    for block in model.stages:
        shortcut, h = torch.relu(block.shortcut(h)), block(h)
        assert torch.equal(h, shortcut)
    assert h.shape != x.shape


def test_models_without_residual_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm\.zero_init_residual = true: the model has no residual block"):
        zero_init_residual(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
