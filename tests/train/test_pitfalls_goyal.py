"""Goyal et al. 2017 (arXiv:1706.02677), section 3, lists what goes wrong when SGD is distributed.

The remarks on a whole step; those on the optimiser stand in tests/optim, those on batch norm in tests/norm.
"""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from ranks import run_ranks
from train.assembled import assembled, gradients


def one_step(rank: int, micro: int) -> tuple[dict[str, torch.Tensor], list[int], float]:
    """A step of a window of 96 on two ranks; its gradient, this rank's samples, and the loss."""
    from bigbatch.config import RunConfig, merge
    from bigbatch.dist import Runtime
    from bigbatch.plan import resolve
    from bigbatch.train import assemble, train_step
    from bigbatch.train.step import my_pieces
    from train.assembled import BASE

    group = {"kind": "group", "groups": 2}
    config = RunConfig.model_validate(merge(BASE, {"batch": {"global": 96, "micro": micro}, "norm": group}))
    parts = assemble(config, resolve(config, world_size=2, dataset_size=1085), Runtime(precision="fp64"))
    report = train_step(parts, samples=960)
    seen = [
        int(i)
        for piece in my_pieces(parts, 960)
        for i in parts.loader.stream.locate(range(960 + piece.start, 960 + piece.stop))[0]
    ]
    assert report.loss is not None
    return gradients(parts), seen, report.loss


@pytest.mark.parametrize("micro", [48, 16])
def test_loss_is_normalised_by_the_global_batch_not_per_worker(micro: int, tmp_path: Path) -> None:
    """Remark 3: all-reduce sums, so a per-worker mean must be divided by the number of workers too."""
    whole = assembled(norm={"kind": "group", "groups": 2})
    batch = whole.loader.train(range(960, 1056))
    loss = cross_entropy(whole.model(batch["image"]), batch["label"])
    loss.backward()
    for grads, _, mean in run_ranks(2, one_step, micro):
        assert mean == pytest.approx(loss.item(), rel=1e-12)
        for name, parameter in whole.model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_workers_share_one_shuffle_per_epoch() -> None:
    """Remark 4, data shuffling: one random order, cut over the workers; each sample once per epoch."""
    (_, first, _), (_, second, _) = run_ranks(2, one_step, 16)
    assert not set(first) & set(second)
    whole = assembled()
    index, _ = whole.loader.stream.locate(range(960, 1056))
    assert sorted(first + second) == sorted(int(i) for i in index)
    every, _ = whole.loader.stream.locate(range(1085))
    assert sorted(int(i) for i in every) == list(range(1085))
    again, _ = whole.loader.stream.locate(range(1085, 2170))
    assert sorted(int(i) for i in again) == list(range(1085)) and list(again) != list(every)
