"""A step decay that grows the batch (Smith et al. 2017, arXiv:1711.00489)."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.config import ConfigError, RunConfig, merge
from bigbatch.plan import Plan, resolve

BASE: dict[str, Any] = {
    "duration": "10ep",
    "batch": {"global": 64},
    "optim": {"name": "sgd", "lr": 0.1},
    "decay": {"kind": "multistep", "at": ["40%", "70%", "90%"], "factor": 0.5, "by": "batch"},
    "task": {"name": "classification", "model": "bigbatch/resnet_small"},
    "data": {"name": "synthetic"},
}


def plan(world_size: int = 1, size: int = 10_000, **sections: Any) -> Plan:
    return resolve(RunConfig.model_validate(merge(BASE, sections)), world_size=world_size, dataset_size=size)


def starts(result: Plan) -> list[int]:
    """The samples seen before each step."""
    seen = [0]
    while seen[-1] < result.samples:
        seen.append(seen[-1] + result.window(seen[-1]))
    assert seen.pop() == result.samples
    return seen


@st.composite
def ramps(draw: st.DrawFn) -> dict[str, Any]:
    total = draw(st.integers(100, 3000))
    at = sorted(draw(st.sets(st.integers(1, total - 1), min_size=1, max_size=5)))
    kinds = {"step": {"every": f"{at[0]}ex"}, "multistep": {"at": [f"{s}ex" for s in at]}}
    kind = draw(st.sampled_from(sorted(kinds)))
    decay = {"kind": kind, **kinds[kind], "factor": draw(st.sampled_from([0.5, 0.2, 1 / 3])), "by": "batch"}
    batch = {"global": draw(st.integers(1, 20)), "max": draw(st.integers(100, 1000))}
    return {"duration": f"{total}ex", "decay": decay, "batch": batch}


@given(ramps())
def test_windows_are_the_stages_and_steps_counts_them(sections: dict[str, Any]) -> None:
    try:
        result = plan(size=500, **sections)
    except ConfigError as error:
        assert "more than the run's" in str(error)
        return
    seen = starts(result)
    assert len(seen) == result.steps
    assert all(result.window(s) == result.batch(s) <= sections["batch"]["max"] for s in seen[:-1])
    left = result.samples - seen[-1]
    assert result.window(seen[-1]) == left <= result.batch(seen[-1])
    message = next((w.message for w in result.warnings if w.code == "short_last_window"), "")
    assert (f"has {left} of {result.batch(seen[-1])} samples" in message) == (left < result.batch(seen[-1]))


@given(ramps())
def test_growth_of_the_batch_times_fall_of_the_rate_is_that_of_the_decay(sections: dict[str, Any]) -> None:
    try:
        result = plan(**sections)
    except ConfigError:
        return
    by_rate = plan(**merge(sections, {"decay": {"by": "lr"}, "batch": {"max": None}}))
    for s in range(0, result.samples, 7):
        assert result.lr(s) / result.batch(s) == pytest.approx(by_rate.lr(s) / by_rate.batch(s))


def test_a_ramp_as_the_plan_tells_it() -> None:
    result = plan(2, batch={"micro": 16})
    assert result.batches.stages == ((0, 64), (40_000, 128), (70_000, 256), (90_000, 512))
    assert (result.global_batch, result.accumulation, result.lr(99_999)) == (64, 2, 0.1)
    told = {decision.what: decision for decision in result.decisions}
    assert told["batch_ramp"].value == "64 → 128 at 40000 samples → 256 at 70000 samples → 512 at 90000 samples"
    assert "accumulation 16 in the last stage" in told["batch_ramp"].why
    assert "stays at its peak" in told["decay"].why and "falls" not in told["decay"].why
    assert told["decay"].source == "Smith et al. 2017, arXiv:1711.00489"
    assert json.loads(result.to_json())["batches"]["stages"][1] == [40_000, 128]


def test_at_the_largest_batch_the_rate_falls() -> None:
    result = plan(batch={"max": 255}, warmup={"kind": "gradual", "duration": "10%", "start": "zero"})
    at = (5_000, 39_999, 40_000, 69_999, 70_000, 90_000)
    assert [result.batch(s) for s in at] == [64, 64, 128, 128, 128, 128]
    assert [result.lr(s) for s in at] == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.05, 0.025])
    assert "until the batch would pass batch.max" in next(d.why for d in result.decisions if d.what == "decay")


def test_a_step_may_start_before_a_milestone_and_end_after_it() -> None:
    result = plan(size=100, duration="1000ex", decay={"at": ["100ex"]})
    assert starts(result)[:4] == [0, 64, 128, 256]


def test_steps_of_a_long_ramp_are_counted_at_once() -> None:
    result = plan(size=10**9, duration="1000ep", batch={"global": 1})
    assert result.steps == 4 * 10**11 + 15 * 10**10 + 5 * 10**10 + 125 * 10**8


def test_every_step_is_tracked() -> None:
    result = plan()
    assert all(result.is_due(result.track_every, before=s, after=s + result.window(s)) for s in starts(result))


@pytest.mark.parametrize(
    ("code", "sections", "message"),
    [
        ("large_share_of_data", {"decay": {"factor": 0.1}}, "largest batch of the ramp, 64000, is 640%"),
        ("span_follows_micro", {}, "over each micro batch of 64"),
    ],
)
def test_warnings_look_at_the_last_stage(code: str, sections: dict[str, Any], message: str) -> None:
    assert message in next(w.message for w in plan(**sections).warnings if w.code == code)
    fixed = plan(size=8_000, batch={"max": 512}, norm={"span": 64}, data={"augment": {"flip": True}})
    assert code not in {warning.code for warning in fixed.warnings}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"decay": {"factor": 0.3}}, r"decay.factor = 0.3: .*nearest legal: 0.3333333 \(3 times\) or 0.25 \(4 times\)"),
        ({"decay": {"factor": 0.9}}, r"decay.factor = 0.9: .*nearest legal: 0.5 \(2 times\)"),
        ({"decay": {"factor": 1.0}}, "decay.factor = 1: .*whole number from 2 on"),
        ({"decay": {"kind": "cosine", "by": "batch"}}, "decay.by = batch: decay.kind cosine has no milestones"),
        ({"decay": {"factor": 0.001}}, "decay.by = batch: at 70000 .* more than the run's .*set batch.max=64000"),
        ({"decay": {"factor": 1e-320}}, "decay.factor|decay.by"),
        ({"decay": {"by": "lr"}, "batch": {"max": 512}}, "batch.max = 512: decay.by is lr"),
        ({"batch": {"max": 127}}, "batch.max = 127: .*use at least 128"),
        ({"data": {"last": "short"}}, "data.last = short: .*use data.last=cross"),
        ({"data": {"last": "drop"}}, "data.last = drop: .*use data.last=cross"),
        ({"duration": "500st"}, "duration = 500st: .*use ep or ex"),
        ({"eval": {"every": "2st"}}, "eval.every = 2st: with decay.by=batch .*use 1st, or ep, ex or %"),
        ({"decay": {"at": ["9st"]}}, "decay.at = 9st: with decay.by=batch"),
        ({"warmup": {"kind": "gradual", "duration": "5st"}}, "warmup.duration = 5st: with decay.by=batch"),
        ({"run": {"stop_after": "5st"}}, "run.stop_after = 5st: with decay.by=batch"),
    ],
)
def test_what_a_ramp_cannot_meet_is_an_error(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**sections)
