"""Running statistics: one update per optimiser step, whatever the accumulation; merged, skipped, loaded."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bigbatch.norm import BatchStats, SpanBatchNorm
from reference.batch_norm import batch_norm

torch.set_num_threads(1)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 2


def model(span: int) -> nn.Sequential:
    return nn.Sequential(
        SpanBatchNorm(3, span=span, momentum=0.2), nn.Tanh(), SpanBatchNorm(3, span=span, momentum=0.4)
    ).double()


def nothing(tensor: Tensor) -> None:
    """The sum over one process."""


def test_accumulation_commits_once() -> None:
    """Micro batches of unequal size, ghosts with tails: the update is that of the groups' weighted mean."""
    ours = model(4)
    stats = BatchStats(ours)
    first = ours[0]
    running = {"mean": torch.zeros(3).double(), "var": torch.ones(3).double()}
    for step in range(10):
        parts = [random(n, 3, 2, seed=10 * step + n) for n in (8, 9, 3)]
        means, variances = [], []
        for x in parts:
            ours(x)
            _, mean, var = batch_norm(x, first.weight, first.bias, span=4, eps=1e-5)
            means.append(len(x) * mean)
            variances.append(len(x) * var)
        stats.commit(20)
        running["mean"] = 0.8 * running["mean"] + 0.2 * sum(means) / 20
        running["var"] = 0.8 * running["var"] + 0.2 * sum(variances) / 20
    torch.testing.assert_close(first.running_mean, running["mean"].detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.running_var, running["var"].detach(), rtol=1e-12, atol=1e-12)
    assert int(first.num_batches_tracked) == 10


class Shares:
    """Three ranks on one process: their merges run one after the other, and only the last one's sum is whole."""

    def __init__(self, start: nn.Module) -> None:
        self.models = [copy.deepcopy(start) for _ in range(3)]
        self.stats = [BatchStats(m) for m in self.models]

    def merge(self) -> int:
        flats: list[Tensor] = []
        for rank, stats in enumerate(self.stats):
            stats.merge(flats.append, rank)
        if flats:
            for m in self.models:
                layers = [m[0], m[2]]
                buffers = [x.running_mean for x in layers] + [x.running_var for x in layers]
                torch._foreach_copy_(buffers, list(sum(flats).split(3)))
        return len(flats)


@pytest.mark.parametrize("start", ["fresh", "loaded"])
def test_merged_shares_are_the_whole(start: str) -> None:
    """The ranks' groups, committed apart over several steps and merged, are one process's groups."""
    whole = model(4)
    if start == "loaded":
        whole(random(8, 3, seed=0))
        BatchStats(whole).commit(8)
    stats = BatchStats(whole)
    ranks = Shares(model(4))
    for m in ranks.models:
        m.load_state_dict(whole.state_dict())
    for step in range(9):
        x = random(12, 3, seed=step)
        sizes = [(4, 4, 4), (8, 4, 0), (0, 4, 8)][step % 3]
        whole(x)
        stats.commit(12)
        for one, part, own in zip(ranks.models, x.split(sizes), ranks.stats, strict=True):
            own.empty(not len(part))
            one(part if len(part) else x[:1])
            own.commit(12)
        if step in (3, 5, 8):
            assert ranks.merge() == 3
            assert ranks.merge() == 0
            for one in ranks.models:
                torch.testing.assert_close(one.state_dict(), whole.state_dict(), rtol=1e-12, atol=1e-12)


def test_on_one_process_merging_changes_no_bit() -> None:
    ours = model(4)
    stats = BatchStats(ours)
    ours(random(8, 3, seed=0))
    stats.commit(8)
    before = copy.deepcopy(ours.state_dict())
    stats.merge(nothing, 0)
    stats.merge(nothing, 0)
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)


def test_loading_counts_as_merged() -> None:
    ours = model(4)
    stats = BatchStats(ours)
    ours(random(8, 3, seed=0))
    stats.commit(8)
    saved = copy.deepcopy(ours.state_dict())
    ours(random(8, 3, seed=1))
    stats.commit(8)
    ours.load_state_dict(saved)
    calls: list[Tensor] = []
    stats.merge(calls.append, 1)
    assert calls == []
    torch.testing.assert_close(ours.state_dict(), saved, rtol=0, atol=0)


def test_a_skipped_step_leaves_no_trace() -> None:
    ours, plain = model(4), model(4)
    stats, expected = BatchStats(ours), BatchStats(plain)
    ours(random(8, 3, seed=0) * float("inf"))
    stats.discard()
    for m, s in ((ours, stats), (plain, expected)):
        m(random(8, 3, seed=1))
        s.commit(8)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_frozen_layers_are_left_alone() -> None:
    ours = model(4)
    stats = BatchStats(ours)
    ours[2].eval()
    frozen = copy.deepcopy(ours[2].state_dict())
    ours(random(8, 3, seed=0))
    stats.commit(8)
    torch.testing.assert_close(ours[2].state_dict(), frozen, rtol=0, atol=0)
    assert int(ours[0].num_batches_tracked) == 1
    ours[0].eval()
    stats.commit(8)
    assert int(ours[0].num_batches_tracked) == 1


def test_a_layer_that_runs_twice_is_refused() -> None:
    ours = model(4)
    ours(random(8, 3, seed=0))
    ours[0](random(8, 3, seed=0))
    with pytest.raises(ValueError, match=r"'0': 16, '2': 8.*step of 8.*norm\.kind=group"):
        BatchStats(ours).commit(8)
    ours = model(4)
    ours(random(8, 3, seed=0))
    with pytest.raises(ValueError, match="step of 4"):
        BatchStats(ours).commit(4)


def test_a_model_without_batch_norm() -> None:
    stats = BatchStats(nn.Linear(2, 2))
    stats.empty(True)
    stats.commit(4)
    stats.discard()
    stats.merge(lambda _: pytest.fail("nothing to exchange"), 1)
