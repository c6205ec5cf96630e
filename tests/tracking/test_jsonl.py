from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bigbatch.tracking import Jsonl, read_events


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "samples": number * 10, "loss": 1.0 / number, **more}


def write(path: Path, events: list[dict[str, Any]], *, resume_step: int | None = None) -> list[dict[str, Any]]:
    """Log the events, then read the file as a stranger would: strict JSON, one object a line."""
    tracker = Jsonl(path, resume_step=resume_step)
    tracker.start({}, {})
    for event in events:
        tracker.log(event)
    tracker.finish("done")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_one_object_a_line_in_the_order_of_its_keys(tmp_path: Path) -> None:
    events = [{"event": "step", "step": 1, "zebra": 1, "ant": [1, {"b": None}], "word": "Größe\n"}, step(2)]
    read = write(tmp_path / "metrics.jsonl", events)
    assert read == events
    assert list(read[0]) == ["event", "step", "zebra", "ant", "word"]


def test_every_event_is_on_disk_at_once(tmp_path: Path) -> None:
    tracker = Jsonl(tmp_path / "new" / "metrics.jsonl", resume_step=None)
    tracker.start({}, {})
    for number in (1, 2, 3):
        tracker.log(step(number))
        assert [event["step"] for event in read_events(tmp_path / "new" / "metrics.jsonl")][-1] == number
    tracker.finish("done")


def test_a_float_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    event = step(1, a=math.nan, b=[math.inf, 2.0], c={"d": -math.inf, "e": "nan"}, f=True)
    (read,) = write(tmp_path / "metrics.jsonl", [event])
    assert read == {**event, "a": None, "b": [None, 2.0], "c": {"d": None, "e": "nan"}}
    assert math.isnan(event["a"])


def test_a_run_from_its_beginning_empties_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [step(1), step(2)])
    assert write(path, [step(1)]) == [step(1)]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before: list[dict[str, Any]] = [
        {"event": "warning", "message": "no step of its own"},
        step(1),
        step(2),
        {"event": "eval", "split": "validation", "step": 2, "loss": 0.5},
        {"event": "checkpoint", "step": 2},
    ]
    lost: list[dict[str, Any]] = [
        step(3),
        {"event": "warning", "step": 3, "message": "comes again with step 3"},
        {"event": "eval", "split": "validation", "step": 4, "loss": 0.4},
        {"event": "checkpoint", "step": 4},
    ]
    resume = {"event": "resume", "step": 4, "checkpoint": "00000004"}
    write(path, [*before, *lost, resume])
    assert write(path, [step(3), step(4)], resume_step=2) == [*before, resume, step(3), step(4)]


@pytest.mark.parametrize("torn", [b'{"event": "step", "st', b'{"event": "step", "word": "\xc3', b"17\n", b"\0\0\0\0"])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [step(1), step(2)])
    path.write_bytes(path.read_bytes() + torn)
    assert list(read_events(path)) == [step(1), step(2)]
    assert write(path, [step(3)], resume_step=2) == [step(1), step(2), step(3)]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [step(1), step(2)])
    path.write_bytes(path.read_bytes()[:-1])
    assert write(path, [step(3)], resume_step=2) == [step(1), step(2), step(3)]


def test_a_resume_without_a_file_starts_one(tmp_path: Path) -> None:
    assert write(tmp_path / "metrics.jsonl", [step(8)], resume_step=7) == [step(8)]


def test_a_rewrite_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [step(1), step(2)])
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    tracker = Jsonl(path, resume_step=1)
    with pytest.raises(OSError, match="no space"):
        tracker.start({}, {})
    tracker.finish("failed")
    assert path.read_bytes() == before
