from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import rich.console

from bigbatch.tracking import Console

STEPS, BATCH = 200, 50


def tracked(
    mode: Literal["auto", "bar", "lines", "none"], events: list[dict[str, Any]], *, terminal: bool, width: int = 80
) -> str:
    """What a run of 200 steps of 50 samples prints, each call of the clock a second after the last."""
    seconds: Iterator[float] = iter(range(10_000))
    out = rich.console.Console(
        file=io.StringIO(), force_terminal=terminal, width=width, _environ={"TERM": "xterm-256color"}
    )
    tracker = Console(mode, total_samples=STEPS * BATCH, total_steps=STEPS, console=out, clock=lambda: next(seconds))
    tracker.start({}, {})
    for event in events:
        tracker.log(event)
    tracker.finish("done")
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def step(number: int, **more: Any) -> dict[str, Any]:
    samples = number * BATCH
    event = {"event": "step", "step": number, "samples": samples, "epoch": samples / 1437, "loss": 1 / number}
    return {**event, "lr": 0.4, "grad_norm": 2.0, "global_batch": BATCH, "samples_per_second": 12345.6, **more}


EVAL = {"event": "eval", "split": "validation", "step": 100, "samples": 5000, "loss": 0.123456, "accuracy": 0.97}


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("mode", ["auto", "lines"])
def test_lines_where_there_is_no_terminal(mode: Literal["auto", "lines"]) -> None:
    text = tracked(mode, [step(number) for number in range(1, STEPS + 1)], terminal=False)
    lines = text.splitlines()
    assert "\x1b" not in text
    assert [int(re.search(r"step (\d+)/200", line)[1]) for line in lines] == [1, *range(10, 201, 10)]  # type: ignore[index]
    assert lines[10] == " 50%  step 100/200  epoch 3.479  loss 0.01  lr 0.4  12,346/s  0:01:40 left"
    assert lines[-1].startswith("100%") and lines[-1].endswith("0:00:00 left")


def test_the_first_line_knows_no_time_left() -> None:
    (line,) = tracked("lines", [step(1)], terminal=False).splitlines()
    assert line.endswith("/s")


def test_a_resumed_run_counts_time_from_its_own_start() -> None:
    lines = tracked("lines", [step(number) for number in range(101, STEPS + 1)], terminal=False).splitlines()
    assert len(lines) == 11
    assert lines[1].endswith("0:01:30 left")


def test_evaluations_resumes_and_warnings_have_a_line_each() -> None:
    long = "x" * 300 + " [bold]no markup[/bold]"
    events = [
        {"event": "resume", "step": 7, "samples": 350, "checkpoint": "00000007"},
        {"event": "warning", "code": "lars", "message": long},
        EVAL,
        {"event": "checkpoint", "step": 100},
    ]
    assert tracked("auto", events, terminal=False).splitlines() == [
        "resume  step 7  samples 350  checkpoint 00000007",
        f"warning: {long}",
        "validation  step 100  samples 5000  loss 0.1235  accuracy 0.97",
    ]


def test_a_loss_that_was_not_asked_for_or_is_not_finite() -> None:
    text = tracked("lines", [step(1, loss=None), step(20, loss=float("nan"))], terminal=False)
    assert "loss None" in text and "loss nan" in text


@pytest.mark.parametrize("mode", ["auto", "bar"])
def test_a_bar_on_a_terminal(mode: Literal["auto", "bar"]) -> None:
    text = tracked(mode, [*(step(number) for number in range(1, 101)), EVAL], terminal=True)
    assert "\x1b[?25l" in text and text.rstrip().endswith("\x1b[?25h"), "the cursor comes back"
    last = plain(text).rstrip().splitlines()[-1]
    assert " 50% ━━" in last
    assert "epoch 3.479  loss 0.01  lr 0.4  12,346/s  0:01:40 left" in last
    assert len(last.rstrip()) <= 80
    assert "validation  step 100  samples 5000  loss 0.1235  accuracy 0.97" in plain(text)


@pytest.mark.parametrize("mode", ["none"])
@pytest.mark.parametrize("terminal", [True, False])
def test_none_is_silent(mode: Literal["none"], terminal: bool) -> None:
    events = [step(1), EVAL, {"event": "warning", "message": "hush"}]
    assert tracked(mode, events, terminal=terminal) == ""


def test_a_failed_run_gives_the_terminal_back() -> None:
    out = rich.console.Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    tracker = Console("bar", total_samples=100, total_steps=2, console=out)
    tracker.start({}, {})
    tracker.finish("failed")
    assert isinstance(out.file, io.StringIO)
    assert "\x1b[?25h" in out.file.getvalue()
