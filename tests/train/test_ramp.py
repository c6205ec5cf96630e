"""A run whose batch grows, in one process."""

import json
from pathlib import Path
from typing import Any

import pytest

from bigbatch.signals import StopSignal
from bigbatch.train import train
from train.assembled import assembled


def steps(run: Path, micro: int, **more: Any) -> list[dict[str, Any]]:
    parts = assembled(
        duration="2ep",
        batch={"global": 32, "micro": micro, "max": 128},
        decay={"kind": "multistep", "at": ["30%", "60%", "85%"], "factor": 0.5, "by": "batch"},
        task={"name": "classification", "model": "bigbatch/resnet_small", "options": {"widths": [4]}},
        norm={"kind": "group", "groups": 2},
        tracking={"console": "none"},
        run={"dir": str(run), **more},
    )
    train(parts, StopSignal(grace=60))
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "step"]


def test_the_batch_grows_and_the_cut_does_not_matter(tmp_path: Path) -> None:
    """Another micro batch, and a stop within the second stage, give the same windows, rates and losses."""
    whole = steps(tmp_path / "whole", micro=32)
    steps(tmp_path / "cut", micro=8, stop_after="45%")
    cut = steps(tmp_path / "cut", micro=8)
    sizes = [event["global_batch"] for event in whole]
    assert sizes == sorted(sizes[:-1]) + sizes[-1:] and set(sizes[:-1]) == {32, 64, 128}
    assert sum(sizes) == 2 * 1085
    assert [event["global_batch"] for event in cut] == sizes
    assert [event["lr"] for event in cut] == [event["lr"] for event in whole]
    assert (whole[0]["lr"], whole[-1]["lr"]) == (0.1, 0.05)
    assert [event["loss"] for event in cut] == pytest.approx([event["loss"] for event in whole], rel=1e-8)
