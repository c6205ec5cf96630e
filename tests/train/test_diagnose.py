"""A gradient that is not finite is traced to rank, layer and samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigbatch.data import Batch
from bigbatch.signals import StopSignal
from bigbatch.train import Parts, RunError, train
from bigbatch.train.diagnose import diagnose
from train.assembled import assembled


def poison(parts: Parts, sample: int, value: float) -> None:
    gather = parts.loader.dataset.train.gather

    def poisoned(index: Tensor, epoch: Tensor | None) -> Batch:
        batch = gather(index, epoch)
        image = batch["image"].float()
        image[index == sample] = value
        return {**batch, "image": image}

    object.__setattr__(parts.loader.dataset.train, "gather", poisoned)


def test_a_broken_sample() -> None:
    parts = assembled(norm={"kind": "group", "groups": 2}, batch={"global": 1000, "micro": 100})
    poison(parts, 17, float("nan"))
    epoch, _ = parts.loader.stream.locate(range(1000))
    assert 17 in epoch
    assert diagnose(parts, 0) == "rank 0: data, image is not finite for samples 17"
    assert all(p.grad is None for p in parts.model.parameters())


def test_a_layer_that_overflows() -> None:
    parts = assembled(norm={"kind": "group", "groups": 2})
    name, layer = next((name, module) for name, module in parts.model.named_modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        layer.weight[3, 0] = torch.inf
    message = diagnose(parts, 960)
    ids, _ = parts.loader.stream.locate(range(960, 1056))
    named = ", ".join(map(str, ids[:8].tolist()))
    assert message == f"rank 0: the output of {name} is not finite for samples {named} and 88 more"


def test_a_gradient_alone() -> None:
    """√ at 0: the loss is finite, its slope is not."""
    parts = assembled(norm={"kind": "group", "groups": 2})
    head = next(module for module in parts.model.modules() if isinstance(module, nn.Linear))
    head.register_forward_hook(lambda module, args, output: output + (output - output.detach()).abs().sqrt())
    assert diagnose(parts, 0).startswith("rank 0: the gradient of ")


def test_nothing_to_find() -> None:
    assert diagnose(assembled(), 0) == "the passes of each process are finite, their sum is not"


def test_the_run_ends_with_it(tmp_path: object) -> None:
    parts = assembled(run={"dir": str(tmp_path), "nonfinite_limit": 2}, tracking={"console": "none"})
    poison(parts, int(parts.loader.stream.locate(range(1))[0][0]), float("inf"))
    head = next(module for module in parts.model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        head.bias[0] = torch.nan
    with pytest.raises(RunError, match=r"step 2: .* in 2 steps in a row .* rank 0: the output of .* samples \d+"):
        train(parts, StopSignal(grace=60))
