from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigbatch.tracking import Jsonl, Trackers, read_events


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


def test_a_rewrite_that_fails_leaves_the_old_file_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [step(1), step(2)])
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    tracker = Jsonl(path, resume_step=1)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        tracker.start({}, {})
        with pytest.raises(OSError, match="no space"):
            tracker.log(step(2, again=True))
        assert path.read_bytes() == before
    tracker.log(step(3))
    tracker.finish("done")
    assert list(read_events(path)) == [step(1), step(2, again=True), step(3)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs a file system that can be full, and mount says: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path, *, room: int = 0) -> Path:
    left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(left - room))
    return disk / "filler"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_full_disk_loses_no_event(small_disk: Path, resumed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_disk / "metrics.jsonl"
    before = [step(1), step(2)] if resumed else []
    if resumed:
        write(path, before)
    filler = fill(small_disk, room=0 if resumed else 4096)  # no room to rewrite, or for some events and a part of one
    trackers = Trackers([Jsonl(path, resume_step=2 if resumed else None)])
    trackers.start({}, {})
    for number in range(3, 200):
        trackers.log(step(number))
    assert len(list(read_events(path))) < 100
    filler.unlink()
    trackers.log(step(200))
    trackers.finish("done")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*before, *map(step, range(3, 201))]
    (said,) = capsys.readouterr().err.splitlines()
    assert "jsonl failed: [Errno 28] No space left on device; it is tried again" in said


def test_what_waits_for_the_disk_is_bounded(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bigbatch.tracking.jsonl.MOST_UNWRITTEN", 1000)
    filler = fill(small_disk)
    trackers = Trackers([Jsonl(small_disk / "metrics.jsonl", resume_step=None)])
    trackers.start({}, {})
    for number in range(1, 100):
        trackers.log(step(number))
    filler.unlink()
    for number in range(100, 103):
        trackers.log(step(number))
    trackers.finish("done")
    kept = [event["step"] for event in read_events(small_disk / "metrics.jsonl")]
    assert kept == [*range(1, len(kept) - 1), 101, 102] and 10 < len(kept) < 40
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_disk_that_stays_full_is_told_at_the_end(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(small_disk)
    trackers = Trackers([Jsonl(small_disk / "metrics.jsonl", resume_step=None)])
    trackers.start({}, {})
    trackers.log(step(1))
    trackers.finish("done")
    tried, lost = capsys.readouterr().err.splitlines()
    assert "tried again" in tried and "goes on without it" in lost
