"""Processes for one function call: their errors, their ends, their results."""

from __future__ import annotations

import os
import time

import pytest

import ranks
from ranks import run_ranks


def fails(rank: int) -> None:
    import torch.distributed as dist

    if rank == 1:
        raise KeyError("the second rank's own mistake")
    dist.barrier()


def test_run_ranks_raises_a_ranks_error_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1:.*in fails.*KeyError: \"the second rank's own mistake\""):
        run_ranks(2, fails)


def dies(rank: int) -> None:
    if rank == 0:
        os._exit(3)
    time.sleep(60)


def test_a_rank_that_dies_does_not_hang_the_others() -> None:
    with pytest.raises(RuntimeError, match="rank 0 died"):
        run_ranks(2, dies)


def sleeps(rank: int) -> None:
    time.sleep(60)


def test_slow_ranks_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LIMIT", 1.0)
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1"):
        run_ranks(1, sleeps)


def who(rank: int, word: str) -> tuple[int, str, str]:
    return rank, word, os.environ["RANK"]


def test_results_come_by_rank() -> None:
    assert run_ranks(3, who, "hello") == [(r, "hello", str(r)) for r in range(3)]
