"""With the real library, offline: no account, no network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from bigbatch.config.models import Wandb as Settings
from bigbatch.tracking import Jsonl, Trackers, Wandb
from bigbatch.tracking.wandb import _last_step
from tracking.wandb_log import history, log_of, records, starts, wait_for_end

OFFLINE = Settings(mode="offline", project="digits", name="first", tags=("a", "b"))
CONFIG = {"seed": 3, "optim": {"name": "lars", "lr": 0.1}}
PLAN = {"steps": 6, "world_size": 2, "decisions": [{"what": "steps", "value": "6"}]}


def step(number: int) -> dict[str, Any]:
    event = {"event": "step", "step": number, "samples": number * 10, "epoch": number / 4, "loss": 1 / number}
    return {**event, "lr": 0.4, "grad_norm": 2.0, "global_batch": 10, "samples_per_second": 1e3}


def evaluation(number: int, split: str = "validation") -> dict[str, Any]:
    return {"event": "eval", "split": split, "step": number, "samples": number * 10, "loss": 0.5, "accuracy": 0.25}


def run(dir: Path, events: list[dict[str, Any]], *, resume_step: int | None = None) -> None:
    trackers = Trackers(
        [Jsonl(dir / "metrics.jsonl", resume_step=resume_step), Wandb(OFFLINE, dir=dir, resume_step=resume_step)]
    )
    trackers.start(CONFIG, PLAN)
    for event in events:
        trackers.log(event)
    trackers.finish("done")
    wait_for_end(starts(dir)[-1])


def steps(start: Path) -> list[int]:
    return [row["_step"] for row in history(start)]


@pytest.fixture(autouse=True)
def no_failure(capfd: pytest.CaptureFixture[str]) -> Any:
    """A tracker's failure is only a line on stderr, and W&B itself must leave the terminal to the console."""
    yield
    assert capfd.readouterr() == ("", "")


def test_one_directory_and_one_row_for_each_logged_step(tmp_path: Path) -> None:
    run(
        tmp_path,
        [
            {"event": "warning", "message": "not a metric"},
            *(step(number) for number in (1, 2, 3, 5)),
            evaluation(5),
            {"event": "checkpoint", "step": 5},
            step(6),
            evaluation(6),
            evaluation(6, "test"),
        ],
    )
    (start,) = starts(tmp_path)
    rows = history(start)
    assert [row["_step"] for row in rows] == [1, 2, 3, 5, 6]
    assert [row["samples"] for row in rows] == [10, 20, 30, 50, 60]
    assert rows[0]["train/loss"] == 1 and rows[0]["train/lr"] == 0.4 and rows[0]["epoch"] == 0.25
    assert ["validation/accuracy" in row for row in rows] == [False, False, False, True, True]
    assert {"train/loss", "validation/loss", "test/accuracy"} <= set(rows[-1])


def test_config_and_plan_are_attached_and_samples_are_the_axis(tmp_path: Path) -> None:
    run(tmp_path, [step(1)])
    found = records(starts(tmp_path)[0])
    (first,) = [record.run for record in found if record.HasField("run")]
    config = {update.key: json.loads(update.value_json) for update in first.config.update}
    assert config["optim"] == CONFIG["optim"] and config["plan"] == PLAN
    assert (first.project, first.display_name, list(first.tags)) == ("digits", "first", ["a", "b"])
    axes = {record.metric.glob_name: record.metric.step_metric for record in found if record.HasField("metric")}
    assert axes["*"] == "samples"


def test_a_run_of_the_callers_own_is_left_alone(tmp_path: Path) -> None:
    settings = wandb.Settings(silent=True, console="off")
    own = wandb.init(mode="offline", dir=str(tmp_path), id="theirs", settings=settings)
    run(tmp_path / "ours", [step(1), step(2)])
    assert wandb.run is own
    own.log({"loss": 1.0})
    own.finish()
    wait_for_end(starts(tmp_path)[0])
    assert [steps(starts(tmp_path)[0]), steps(starts(tmp_path / "ours")[0])] == [[0], [1, 2]]


def test_a_resumed_run_keeps_its_id_and_never_goes_back(tmp_path: Path) -> None:
    run(tmp_path, [*(step(number) for number in range(1, 6)), evaluation(5)])
    run(tmp_path, [*(step(number) for number in range(4, 9)), evaluation(8, "test")], resume_step=3)
    first, second = starts(tmp_path)
    identity = (tmp_path / "wandb_id.txt").read_text().strip()
    assert f"-{identity}" in first.name and f"-{identity}" in second.name
    assert steps(first) == [1, 2, 3, 4, 5]
    assert steps(second) == [6, 7, 8]


def test_another_run_from_its_beginning_gets_another_id(tmp_path: Path) -> None:
    run(tmp_path, [step(1)])
    first = (tmp_path / "wandb_id.txt").read_text()
    run(tmp_path, [step(1), step(2)])
    assert (tmp_path / "wandb_id.txt").read_text() != first
    assert [steps(start) for start in starts(tmp_path)] == [[1], [1, 2]]


def test_a_killed_run_loses_no_row(tmp_path: Path) -> None:
    """W&B writes its log in the background, so that a killed process takes some rows with it."""
    code = f"""
import os, signal
from pathlib import Path
from tracking.test_wandb import *
dir = Path({str(tmp_path)!r})
trackers = Trackers([Jsonl(dir / "metrics.jsonl", resume_step=None), Wandb(OFFLINE, dir=dir, resume_step=None)])
trackers.start(CONFIG, PLAN)
for number in range(1, 501):
    trackers.log(step(number))
trackers.log(evaluation(500))
os.kill(os.getpid(), signal.SIGKILL)
"""
    tests = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", code], cwd=tests.parent, env=_environment(tests))
    assert killed.returncode == -9
    run(tmp_path, [step(number) for number in range(401, 511)], resume_step=400)
    first, second = starts(tmp_path)
    assert steps(first) + steps(second) == list(range(1, 511))


def test_a_log_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    """Records of every size, so that chunks and paddings fall on each side of a block's end; cut anywhere."""
    payloads = []
    for number in range(1, 121):
        record = Record()
        record.history.step.num = number
        record.history.item.add(key="text", value_json="x" * (100_000 if number % 40 == 0 else 37 * number % 3001))
        payloads.append(record.SerializeToString())
    data, ends = log_of(payloads)
    log = tmp_path / "offline-run-20260101_000000-abc-1" / "run-abc.wandb"
    log.parent.mkdir()
    for cut in sorted(
        {3, 7, len(data), *range(8, len(data), 9973), *(end + more for end in ends for more in (-1, 0, 5))}
    ):
        log.write_bytes(data[:cut])
        assert _last_step(tmp_path, "abc") == (sum(end <= cut for end in ends) or -1), cut
    assert _last_step(tmp_path, "another") == -1


def test_wandb_asked_for_on_a_resume_gets_the_whole_history(tmp_path: Path) -> None:
    metrics = Jsonl(tmp_path / "metrics.jsonl", resume_step=None)
    metrics.start({}, {})
    for event in (step(1), step(2), evaluation(2), step(3)):
        metrics.log(event)
    metrics.finish("done")
    run(tmp_path, [step(3)], resume_step=2)
    (start,) = starts(tmp_path)
    assert steps(start) == [1, 2, 3]
    assert history(start)[1]["validation/accuracy"] == 0.25


def test_without_a_server_the_run_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("BASE_URL", "http://127.0.0.1:9"), ("API_KEY", "0123456789" * 4), ("MODE", "online")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker = Wandb(Settings(mode="online"), dir=tmp_path, resume_step=None, patience=1)
    tracker.start({}, {})
    tracker.log(step(1))
    tracker.finish("done")
    said = capfd.readouterr().err
    assert "no W&B server" in said and f"`wandb sync {tmp_path}/wandb/offline-run-*` sends it later" in said
    (start,) = starts(tmp_path)
    wait_for_end(start)
    assert steps(start) == [1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"0123456789012" in path.read_bytes()]


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("failed", 1), ("preempted", 1)])
def test_the_end_is_told(status: Any, code: int, tmp_path: Path) -> None:
    tracker = Wandb(OFFLINE, dir=tmp_path, resume_step=None)
    tracker.start({}, {})
    tracker.log(step(1))
    tracker.finish(status)
    wait_for_end(starts(tmp_path)[0])
    found = records(starts(tmp_path)[0])
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [code]
    assert any(record.HasField("preempting") for record in found) is (status == "preempted")
    assert steps(starts(tmp_path)[0]) == [1]


def _environment(tests: Path) -> dict[str, str]:
    import os

    mine = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # a service of its own
    return {**mine, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
