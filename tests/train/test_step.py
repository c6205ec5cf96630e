import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bigbatch.cli import main
from bigbatch.tasks.classification import ClassificationTask
from bigbatch.train import train_step
from bigbatch.train.step import dropout
from train.assembled import assembled, gradients

GROUP = {"kind": "group", "groups": 2}


@pytest.mark.parametrize("micro", [96, 32, 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_is_that_of_the_mean_over_the_window(micro: int, smoothing: float) -> None:
    task = {"name": "classification", "model": "bigbatch/resnet_small", "label_smoothing": smoothing}
    parts = assembled(batch={"global": 96, "micro": micro}, norm=GROUP, task=task)
    batch = parts.loader.train(range(96))
    loss = cross_entropy(parts.model(batch["image"]), batch["label"], label_smoothing=smoothing)
    expected = torch.autograd.grad(loss, list(parts.model.parameters()))
    report = train_step(parts, samples=0)
    for grad, parameter in zip(expected, parts.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-12)
    assert report.loss == pytest.approx(loss.item(), rel=1e-12)
    norm = torch.stack([grad.norm() for grad in expected]).norm().item()
    assert report.grad_norm == pytest.approx(norm, rel=1e-12)


def test_short_last_window_is_divided_by_its_own_size() -> None:
    parts = assembled(batch={"global": 96, "micro": 32}, norm=GROUP)
    last = parts.plan.samples - parts.plan.samples % 96
    size = parts.plan.window(last)
    assert 0 < size < 96
    batch = parts.loader.train(range(last, last + size))
    loss = cross_entropy(parts.model(batch["image"]), batch["label"])
    expected = torch.autograd.grad(loss, list(parts.model.parameters()))
    assert train_step(parts, samples=last).global_batch == size
    for grad, parameter in zip(expected, parts.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("span", [8, 24])
def test_accumulation_changes_nothing_with_a_batch_norm_span(span: int) -> None:
    results = []
    for micro in (96, 48, 24):
        parts = assembled(batch={"global": 96, "micro": micro}, norm={"span": span})
        samples = 0
        for _ in range(3):
            train_step(parts, samples=samples)
            samples += 96
        results.append((gradients(parts), {k: v.clone() for k, v in parts.model.state_dict().items()}))
    for grads, state in results[1:]:
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][0][name], rtol=1e-8, atol=1e-11)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-9, atol=1e-12)


class Weighted(ClassificationTask):
    """Every sample weighs as much as its label says, which no plan knows."""

    weight_is_count = False

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        each = cross_entropy(model(batch["image"]), batch["label"], reduction="none")
        return (each * batch["label"]).sum(), self.weight(batch)

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["label"].sum().double()


@pytest.mark.parametrize("micro", [96, 16])
def test_unequal_weights_are_divided_once_by_their_sum(micro: int) -> None:
    parts = assembled(batch={"global": 96, "micro": micro}, norm=GROUP)
    parts = replace(parts, task=Weighted(parts.config.task, parts.loader.dataset.spec))
    batch = parts.loader.train(range(96))
    each = cross_entropy(parts.model(batch["image"]), batch["label"], reduction="none")
    loss = (each * batch["label"]).sum() / batch["label"].sum()
    expected = torch.autograd.grad(loss, list(parts.model.parameters()))
    report = train_step(parts, samples=0)
    assert report.loss == pytest.approx(loss.item(), rel=1e-12)
    for grad, parameter in zip(expected, parts.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-12)


def test_clipping_is_once_per_update() -> None:
    parts = assembled(batch={"global": 96, "micro": 24}, clip={"kind": "norm", "max": 0.01}, norm=GROUP)
    free = assembled(batch={"global": 96, "micro": 96}, norm=GROUP)
    report, whole = (train_step(p, samples=0) for p in (parts, free))
    assert report.grad_norm == pytest.approx(whole.grad_norm, rel=1e-10)
    clipped = math.sqrt(sum(float(grad.square().sum()) for grad in gradients(parts).values()))
    assert clipped == pytest.approx(0.01, rel=1e-4)


def test_the_rate_is_the_plans() -> None:
    parts = assembled(warmup={"kind": "gradual", "duration": "50%", "start": "zero"})
    groups = [{"match": "bias_and_norm", "lr_scale": 0.5}, {"match": "rest"}]
    halves = assembled(optim={"groups": groups}, warmup={"kind": "gradual", "duration": "50%", "start": "zero"})
    for run in (parts, halves):
        report = train_step(run, samples=192)
        assert report.lr == run.plan.lr(192) > 0
    assert [g["lr"] for g in halves.strategy.optimizer.param_groups] == [parts.plan.lr(192) / 2, parts.plan.lr(192)]


def test_overflow_in_fp16_skips_the_step_and_halves_the_scale() -> None:
    parts = assembled(precision="fp16", optim={"name": "lars", "lr": 0.1}, clip={"kind": "norm", "max": 1.0})
    assert parts.scale is not None
    parts.scale.value = 2.0**60
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    report = train_step(parts, samples=0)
    assert report.skipped
    assert parts.scale.value == 2.0**59
    assert not parts.strategy.optimizer.state
    assert all(torch.equal(before[name], tensor) for name, tensor in parts.model.state_dict().items())

    parts.scale.value = 256.0
    report = train_step(parts, samples=96)
    assert not report.skipped
    assert report.lr == parts.plan.lr(96)
    assert any(not torch.equal(before[name], tensor) for name, tensor in parts.model.state_dict().items())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_gradient_is_unscaled_before_it_is_read(precision: str) -> None:
    exact, low = assembled(precision="fp32"), assembled(precision=precision, clip={"kind": "norm", "max": 1e9})
    reports = [train_step(parts, samples=0) for parts in (exact, low)]
    assert reports[1].grad_norm == pytest.approx(reports[0].grad_norm, rel=0.05)
    assert reports[1].loss == pytest.approx(reports[0].loss, rel=0.01)
    assert next(low.model.parameters()).dtype == torch.float32


def test_a_run_that_diverges_stops_with_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "duration: 9ep\nbatch: {global: 64}\noptim: {name: sgd, lr: 1e30}\ndata: {name: digits}\n"
        "task: {name: classification, model: bigbatch/resnet_small}\ntracking: {console: none}\n"
        f"run: {{dir: {tmp_path / 'run'}, nonfinite_limit: 4}}\n"
    )
    assert main(["train", str(recipe)]) == 1
    message = capsys.readouterr().err
    assert "4 steps in a row" in message and "optim.lr" in message


def test_torchs_own_random_numbers_are_those_of_the_place_in_the_stream() -> None:
    parts = assembled()

    def drawn(piece: range) -> Tensor:
        with dropout(parts, piece, range(96)):
            return torch.rand(4)

    assert torch.equal(drawn(range(8, 16)), drawn(range(8, 12)))
    assert not torch.equal(drawn(range(8, 16)), drawn(range(0, 8)))


def test_class_weights_do_not_hold_the_images_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = assembled(
        batch={"global": 96, "micro": 8}, norm=GROUP, task={"class_weights": [1, 2, 3, 1, 1, 1, 1, 1, 1, 1]}
    )
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, train = 0, parts.loader.train

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        batch = train(*args, **kwargs)
        alive.add(batch["image"])
        most = max(most, len(alive))
        return batch

    monkeypatch.setattr(parts.loader, "train", watched)
    train_step(parts, samples=0)
    assert most <= 3


def test_debug_is_deterministic_and_detects_anomalies() -> None:
    from bigbatch.dist import Runtime

    try:
        Runtime(debug=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_anomaly_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.autograd.set_detect_anomaly(False)
