from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bigbatch.config import RunConfig
from bigbatch.tracking import Console, Jsonl, Trackers, Wandb, build_trackers


class Recorder:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, config: dict[str, Any], plan: dict[str, Any]) -> None:
        self.calls.append(("start", config, plan))

    def log(self, event: dict[str, Any]) -> None:
        self.calls.append(event)

    def finish(self, status: str) -> None:
        self.calls.append(status)


class Brittle(Recorder):
    def __init__(self, method: str, error: BaseException) -> None:
        super().__init__()
        self.method, self.error = method, error

    def __getattribute__(self, name: str) -> Any:
        if name in ("start", "log", "finish"):
            self.calls.append(name)
            if name == self.method:
                raise self.error
            return lambda *_: None
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    ("method", "reached"),
    [("start", ["start"]), ("log", ["start", "log"]), ("finish", ["start", "log", "log", "finish"])],
)
def test_a_failing_tracker_is_named_once_and_dropped(
    method: str, reached: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, brittle, last = Recorder(), Brittle(method, RuntimeError("the server\n is gone")), Recorder()
    trackers = Trackers([first, brittle, last])
    trackers.start({"seed": 1}, {"steps": 2})
    trackers.log({"event": "step", "step": 1})
    trackers.log({"event": "step", "step": 2})
    trackers.finish("done")
    assert brittle.calls == reached
    whole = [("start", {"seed": 1}, {"steps": 2}), {"event": "step", "step": 1}, {"event": "step", "step": 2}, "done"]
    assert first.calls == last.calls == whole
    out, err = capsys.readouterr()
    assert (out, err) == ("", "tracking: brittle failed: the server is gone; training goes on without it\n")


def test_what_may_pass_is_tried_again_and_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    brittle = Brittle("log", OSError(28, "No space left on device"))
    trackers = Trackers([brittle])
    for number in (1, 2, 3):
        trackers.log({"event": "step", "step": number})
    brittle.error = RuntimeError("broken for good")
    trackers.log({"event": "step", "step": 4})
    trackers.log({"event": "step", "step": 5})
    assert brittle.calls == ["log"] * 4
    passing, dropped = capsys.readouterr().err.splitlines()
    assert passing.endswith("brittle failed: [Errno 28] No space left on device; it is tried again with the next event")
    assert dropped.endswith("brittle failed: broken for good; training goes on without it")


def test_a_tracker_that_leaves_does_not_take_the_run_along(capsys: pytest.CaptureFixture[str]) -> None:
    last = Recorder()
    Trackers([Brittle("log", SystemExit(1)), last]).log({"event": "step", "step": 1})
    assert last.calls == [{"event": "step", "step": 1}]
    assert "training goes on without it" in capsys.readouterr().err


def test_a_failure_tells_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    Trackers([Brittle("log", RuntimeError("https://me:hunter2@host/x refused"))]).log({"event": "step", "step": 1})
    assert capsys.readouterr().err.startswith("tracking: brittle failed: https://***@host/x refused;")


def test_an_interrupt_is_not_a_failure() -> None:
    with pytest.raises(KeyboardInterrupt):
        Trackers([Brittle("log", KeyboardInterrupt())]).log({"event": "step", "step": 1})


def test_training_goes_on_without_a_stderr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed = (tmp_path / "closed").open("w")
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    last = Recorder()
    Trackers([Brittle("log", RuntimeError()), last]).log({"event": "step", "step": 1})
    assert last.calls == [{"event": "step", "step": 1}]


def test_warnings_come_right_after_the_start() -> None:
    recorder = Recorder()
    Trackers([recorder], warnings=[{"event": "warning", "message": "mind"}]).start({}, {})
    assert recorder.calls == [("start", {}, {}), {"event": "warning", "message": "mind"}]


# ----------------------------------------------------------------------------------------- from the recipe


def recipe(**more: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "duration": "10st",
            "batch": {"global": 32},
            "optim": {"name": "sgd", "lr": 0.1},
            "task": {"name": "classification", "model": "bigbatch/resnet_small"},
            "data": {"name": "digits"},
            **more,
        }
    )


def build(config: RunConfig, tmp_path: Path, *, rank: int = 0) -> Trackers:
    return build_trackers(config, run_dir=tmp_path, resume_step=None, total_steps=10, total_samples=320, rank=rank)


def kinds(trackers: Trackers) -> list[type]:
    return [type(tracker) for tracker in trackers._trackers]


def test_the_recipe_chooses_the_trackers(tmp_path: Path) -> None:
    assert kinds(build(recipe(), tmp_path)) == [Jsonl, Console]
    offline = recipe(tracking={"wandb": {"mode": "offline"}})
    assert kinds(build(offline, tmp_path)) == [Jsonl, Console, Wandb]


def test_only_rank_0_tracks(tmp_path: Path) -> None:
    trackers = build(recipe(tracking={"wandb": {"mode": "offline"}}), tmp_path, rank=1)
    trackers.start({}, {})
    trackers.log({"event": "step", "step": 1})
    trackers.finish("done")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_debug_leaves_wandb_out_and_says_so(mode: str, tmp_path: Path) -> None:
    trackers = build(recipe(debug=True, tracking={"console": "none", "wandb": {"mode": mode}}), tmp_path)
    assert Wandb not in kinds(trackers)
    trackers.start({}, {})
    trackers.finish("done")
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert event["event"] == "warning"
    assert f"tracking.wandb.mode = {mode}" in event["message"]


def test_debug_without_wandb_has_nothing_to_say(tmp_path: Path) -> None:
    trackers = build(recipe(debug=True, tracking={"console": "none"}), tmp_path)
    trackers.start({}, {})
    trackers.finish("done")
    assert (tmp_path / "metrics.jsonl").read_text() == ""
