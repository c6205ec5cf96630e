import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.config import ConfigError, RunConfig, merge
from bigbatch.plan import Plan, resolve

BASE: dict[str, Any] = {
    "duration": "10ep",
    "batch": {"global": 256},
    "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 1e-4},
    "task": {"name": "classification", "model": "bigbatch/resnet_small"},
    "data": {"name": "synthetic"},
}


def plan(world_size: int = 1, size: int = 10_000, **sections: Any) -> Plan:
    return resolve(RunConfig.model_validate(merge(BASE, sections)), world_size=world_size, dataset_size=size)


def codes(result: Plan) -> set[str]:
    return {warning.code for warning in result.warnings}


def test_batch_is_cut_into_processes_micro_and_accumulation() -> None:
    cut = plan(4, batch={"micro": 16})
    assert (cut.world_size, cut.micro_batch, cut.accumulation) == (4, 16, 4)
    assert plan(4).micro_batch == 64
    assert plan(1, batch={"micro_limit": 100}).micro_batch == 64


@given(st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from([48, 96, 240, 4800]), st.sampled_from([None, 8, 16, 48]))
def test_auto_micro_always_multiplies_out(world: int, batch: int, span: int | None) -> None:
    norm = {"span": span or "micro"}
    try:
        cut = plan(world, batch={"global": batch}, norm=norm)
    except ConfigError as error:
        assert "norm.span" in str(error)
        return
    assert cut.micro_batch * cut.accumulation * cut.world_size == batch
    if span:
        assert cut.micro_batch % span == 0 or (span % cut.micro_batch == 0 and world % (span // cut.micro_batch) == 0)


def test_linear_and_sqrt_scaling() -> None:
    linear = plan(batch={"global": 8192}, scaling={"rule": "linear", "base_batch": 256}, size=1_281_167)
    assert (linear.lr_scale, linear.lr_peak, linear.lr_base) == (32, pytest.approx(3.2), 0.1)
    assert plan(batch={"global": 1024}, scaling={"rule": "sqrt", "base_batch": 256}).lr_peak == pytest.approx(0.2)
    assert plan(batch={"global": 1024}).lr_peak == 0.1


def test_warmup_starts() -> None:
    scaling = {"rule": "linear", "base_batch": 64}
    for start, first in (("base", 0.1), ("zero", 0.0), (0.02, 0.02)):
        result = plan(scaling=scaling, warmup={"kind": "gradual", "duration": "1ep", "start": start})
        assert result.lr(0) == first
        assert result.warmup_samples == 10_000
        assert result.warmup_steps == 40
        assert result.lr(40 * 256) == pytest.approx(0.4)


def test_windows_cross_epochs() -> None:
    result = plan(data={"name": "synthetic", "last": "cross"})
    assert (result.steps, result.samples, result.epochs) == (391, 100_000, 10.0)
    assert result.window(9984) == 256
    assert result.window(390 * 256) == 160


def test_windows_short_at_each_epoch_end() -> None:
    result = plan(data={"name": "synthetic", "last": "short"})
    assert (result.steps, result.samples) == (400, 100_000)
    assert result.window(9984) == 16
    assert result.window(10_000) == 256
    steps, samples = 0, 0
    while samples < result.samples:
        samples, steps = samples + result.window(samples), steps + 1
    assert steps == result.steps


def test_windows_drop_the_rest_of_an_epoch() -> None:
    result = plan(data={"name": "synthetic", "last": "drop"})
    assert (result.steps, result.epoch_samples, result.samples) == (390, 9984, 99_840)
    assert "short_last_window" not in codes(result)


@given(
    st.sampled_from(["cross", "short", "drop"]), st.integers(1, 300), st.integers(300, 2000),
    st.sampled_from(["1ep", "2.5ep", "7st", "1234ex"]),
)  # fmt: skip
def test_steps_is_the_number_of_windows(last: str, batch: int, size: int, duration: str) -> None:
    result = plan(size=size, duration=duration, batch={"global": batch}, data={"name": "synthetic", "last": last})
    windows = []
    samples = 0
    while samples < result.samples:
        windows.append(result.window(samples))
        samples += windows[-1]
    assert samples == result.samples
    assert len(windows) == result.steps
    if last == "cross":
        assert set(windows[:-1]) <= {batch}
    if last == "drop":
        assert set(windows) == {batch}


def test_step_durations_count_short_windows() -> None:
    result = plan(duration="500st", data={"name": "synthetic", "last": "short"})
    assert result.steps == 500


def test_events_fall_on_every_multiple_and_on_the_end() -> None:
    result = plan(eval={"every": "1ep"})
    ends, samples = [], 0
    while samples < result.samples:
        after = samples + result.window(samples)
        if result.is_due(result.eval_every, before=samples, after=after):
            ends.append(after)
        samples = after
    assert len(ends) == 10
    assert ends[-1] == 100_000
    assert all(0 <= end - 10_000 * (k + 1) < 256 for k, end in enumerate(ends))


def test_every_step_is_tracked_where_windows_are_short() -> None:
    result = plan(data={"name": "synthetic", "last": "short"}, duration="3ep")
    samples = 0
    while samples < result.samples:
        after = samples + result.window(samples)
        assert result.is_due(result.track_every, before=samples, after=after)
        samples = after


def test_bn_span() -> None:
    assert (plan().bn_span, plan().span) == (256, None)
    assert (plan(norm={"span": 32}).bn_span, plan(norm={"span": 32}).span) == (32, 32)
    assert plan(4, norm={"span": 128}, batch={"micro": 64}).bn_span == 128
    assert plan(4, norm={"span": 128}).micro_batch == 64
    assert plan(norm={"kind": "group"}).bn_span is None


@pytest.mark.parametrize(
    ("sections", "world", "message"),
    [
        ({"batch": {"micro": 100}}, 1, "batch.micro = 100.*use batch.micro=128"),
        ({"batch": {"global": 100}}, 3, "batch.global = 100.*use 99"),
        ({"norm": {"span": 48}, "batch": {"micro": 64}}, 1, "norm.span = 48.*nearest legal: 64"),
        ({"norm": {"span": 192}, "batch": {"micro": 64}}, 4, "norm.span = 192.*nearest legal: 256"),
        ({"norm": {"span": 512}}, 1, "norm.span = 512.*nearest legal: 256"),
        ({"norm": {"kind": "group", "span": 32}}, 1, "norm.span = 32: norm.kind group has no span"),
        ({"scaling": {"rule": "linear"}}, 1, "scaling.base_batch: not set"),
        ({"warmup": {"kind": "gradual"}}, 1, "warmup.duration: not set"),
        ({"warmup": {"duration": "1ep"}}, 1, "warmup.duration = 1ep: warmup.kind is none"),
        ({"warmup": {"kind": "gradual", "duration": "10ep"}}, 1, "warmup.duration = 10ep.*leave nothing"),
        ({"warmup": {"kind": "gradual", "duration": "11ep"}}, 1, "warmup.duration = 11ep.*leave nothing"),
        ({"warmup": {"kind": "gradual", "duration": "100%"}}, 1, "leave nothing"),
        ({"duration": "50%"}, 1, "duration = 50%"),
        ({"duration": "0ep"}, 1, "duration = 0ep: the run has no step"),
        ({"decay": {"kind": "multistep", "at": ["3ep", "2ep"]}}, 1, "decay.at.*must ascend"),
        ({"decay": {"kind": "multistep", "at": ["12ep"]}}, 1, "decay.at = 12ep.*run ends at 100000"),
        (
            {"decay": {"kind": "one_cycle"}, "warmup": {"kind": "gradual", "duration": "1ep"}},
            1,
            "one_cycle rises by itself",
        ),
        ({"parallel": {"expect_world_size": 8}}, 2, "parallel.expect_world_size = 8: 2 processes"),
        ({"debug": True}, 2, "debug = true: one process only, 2 were started"),
        ({"batch": {"global": 20_000}, "data": {"name": "synthetic", "last": "drop"}}, 1, "batch.global = 20000"),
        ({"batch": {"global": 20_000}, "data": {"name": "synthetic", "last": "short"}}, 1, "batch.global = 20000"),
        ({"batch": {"global": 20_000}, "duration": "1ep"}, 1, "duration = 1ep: 10000 samples are less than"),
        ({"eval": {"every": "0ep"}}, 1, "eval.every = 0ep: must be longer than 0"),
        ({"decay": {"kind": "step", "every": "0st"}}, 1, "decay.every = 0st: must be longer than 0"),
        ({"warmup": {"kind": "gradual", "duration": "0ep"}}, 1, "warmup.duration = 0ep: must be longer than 0"),
        ({"warmup": {"start": "zero"}}, 1, "warmup.start = zero: warmup.kind is none"),
        ({"data": {"name": "synthetic", "last": "short"}, "eval": {"every": "2st"}}, 1, "eval.every = 2st.*use 1st"),
        ({"norm": {"groups": 8}}, 1, "norm.groups = 8: norm.kind is batch"),
        ({"clip": {"kind": "norm"}}, 1, "clip.max: not set"),
        ({"clip": {"max": 1.0}}, 1, "clip.max = 1.0: clip.kind is none"),
    ],
)
def test_what_cannot_be_met_is_an_error(sections: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(world, **sections)


@pytest.mark.parametrize(
    ("code", "sections"),
    [
        ("lars_without_decay", {"optim": {"name": "lars", "lr": 1.0}}),
        ("short_last_window", {}),
        ("large_share_of_data", {"batch": {"global": 2000}}),
        ("lr_scaled_above_32", {"scaling": {"rule": "linear", "base_batch": 4}}),
        ("scaled_without_warmup", {"scaling": {"rule": "linear", "base_batch": 64}}),
        ("flat_warmup", {"warmup": {"kind": "gradual", "duration": "1ep"}}),
        (
            "linear_rule_for_adaptive",
            {"optim": {"name": "lamb", "lr": 1.0}, "scaling": {"rule": "linear", "base_batch": 64}},
        ),
        ("best_seldom_judged", {"eval": {"every": "3st"}, "checkpoint": {"every": "4st"}}),
        ("tiny_micro_batch", {"batch": {"global": 4099}}),
        ("span_follows_micro", {"batch": {"micro": 64}}),
    ],
)
def test_warnings_are_named_and_can_be_silent(code: str, sections: dict[str, Any]) -> None:
    assert code in codes(plan(**sections))
    quiet = plan(batch={"global": 250}, norm={"span": 50}, duration="10ep")
    assert quiet.warnings == ()


def test_every_decision_has_a_reason_and_a_source() -> None:
    result = plan(scaling={"rule": "linear", "base_batch": 64}, warmup={"kind": "gradual", "duration": "1ep"})
    whats = [decision.what for decision in result.decisions]
    assert len(whats) == len(set(whats))
    assert {"global_batch", "micro_batch", "bn_span", "steps", "lr_peak", "warmup", "decay"} <= set(whats)
    assert all(decision.why and decision.source for decision in result.decisions)


def test_json_has_the_contract_keys() -> None:
    keys = {
        "world_size", "global_batch", "micro_batch", "accumulation", "bn_span", "steps", "samples", "epochs", "lr_base",
        "lr_peak", "lr_rule", "lr_scale", "warmup_steps", "warnings", "decisions",
    }  # fmt: skip
    tree = json.loads(plan().to_json())
    assert keys <= set(tree)
    assert set(tree["warnings"][0]) == {"code", "message"}
    assert set(tree["decisions"][0]) == {"what", "value", "why", "source"}


@pytest.mark.parametrize("batch", [{"micro": 16}, {"micro_limit": 16}])
def test_debug_takes_a_group_of_many_processes_on_one(batch: dict[str, int]) -> None:
    """Whatever the recipe says of its processes, their batch-norm groups are kept."""
    large: dict[str, Any] = {"batch": {"global": 256, **batch}, "norm": {"span": 32}}
    of_eight = plan(8, **large)
    assert (of_eight.micro_batch, of_eight.bn_span) == (16, 32)
    replay = plan(1, debug=True, parallel={"expect_world_size": 8}, **large)
    assert (replay.micro_batch, replay.accumulation, replay.bn_span) == (32, 8, 32)
    assert [replay.lr(s) for s in range(0, 2560, 256)] == [of_eight.lr(s) for s in range(0, 2560, 256)]


def test_stop_after_ends_early_and_changes_nothing_else() -> None:
    whole, early = plan(), plan(run={"stop_after": "4st"})
    assert early.stop_samples == 1024
    assert early.samples == whole.samples
    assert [early.lr(s) for s in range(0, 1024, 256)] == [whole.lr(s) for s in range(0, 1024, 256)]
