import pytest
import torch

from bigbatch.train import train_step
from train.assembled import assembled, gradients

MIXED = {"augment": {"mixup": 0.5, "cutmix": 1.0, "flip": True}, "shuffle": 100}
WEIGHTS = [0.0, 1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0]


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_mixed_windows_and_class_weights_do_not_depend_on_the_cut(weights: list[float] | None) -> None:
    results = []
    for micro in (75, 25, 3):
        task = {"class_weights": weights, "label_smoothing": 0.1}
        norm = {"kind": "group", "groups": 2}
        parts = assembled(batch={"global": 75, "micro": micro}, data=MIXED, task=task, norm=norm)
        report = train_step(parts, samples=1050)
        results.append((report.loss, gradients(parts)))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][1][name], rtol=1e-8, atol=1e-11)


def test_a_window_without_weight_is_skipped() -> None:
    parts = assembled(batch={"global": 2}, task={"class_weights": [0.0] * 9 + [1.0]})
    labels = [parts.loader.train(range(at, at + 2))["label"] for at in range(0, 40, 2)]
    at = 2 * next(i for i, label in enumerate(labels) if not (label == 9).any())
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    assert train_step(parts, samples=at).skipped
    assert all(torch.equal(before[name], tensor) for name, tensor in parts.model.state_dict().items())
