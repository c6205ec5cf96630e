import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.schedules import BatchSchedule, LrSchedule, curves, lr_scale


def test_scaling_rules() -> None:
    assert lr_scale("linear", batch=8192, base_batch=256) == 32
    assert lr_scale("sqrt", batch=4096, base_batch=256) == 4
    assert lr_scale("none", batch=4096, base_batch=256) == 1


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from(["linear", "sqrt"]))
def test_scaling_composes(a: int, b: int, c: int, rule: str) -> None:
    through = lr_scale(rule, batch=b, base_batch=a) * lr_scale(rule, batch=c, base_batch=b)  # type: ignore[arg-type]
    assert through == pytest.approx(lr_scale(rule, batch=c, base_batch=a))  # type: ignore[arg-type]


@pytest.mark.parametrize("curve", [curves.linear, curves.cosine, curves.poly])
@given(end=st.floats(0, 1), p=st.floats(0, 1), q=st.floats(0, 1))
def test_shares_fall_from_one_to_end(curve, end: float, p: float, q: float) -> None:  # type: ignore[no-untyped-def]
    assert curve(0.0, end=end) == pytest.approx(1)
    assert curve(1.0, end=end) == pytest.approx(end)
    low, high = sorted((p, q))
    assert curve(low, end=end) >= curve(high, end=end) - 1e-12


def test_curves_at_known_points() -> None:
    assert curves.cosine(0.5) == pytest.approx(0.5)
    assert curves.poly(0.5, power=2) == pytest.approx(0.25)
    assert curves.poly(0.3, power=1, end=0.1) == pytest.approx(curves.linear(0.3, end=0.1))
    assert [curves.step(s, every=10, factor=0.5) for s in (0, 9, 10, 25)] == [1, 1, 0.5, 0.25]
    assert [curves.multistep(s, at=(10, 20), factor=0.1) for s in (9, 10, 19, 20)] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert curves.exponential(15, every=10, factor=0.25) == pytest.approx(0.125)
    assert curves.inverse_time(10, every=10, rate=1) == 0.5


def test_one_cycle_rises_and_falls() -> None:
    at = [curves.one_cycle(s, up=30, total=100, start=0.04, end=0.001) for s in range(101)]
    assert at[0] == pytest.approx(0.04)
    assert at[30] == pytest.approx(1.0)
    assert at[100] == pytest.approx(0.001)
    assert all(x < y for x, y in pairwise(at[:31]))
    assert all(x > y for x, y in pairwise(at[30:]))


def test_warm_restarts_cycle_lengths() -> None:
    at = [curves.warm_restarts(s, first=10, multiply=2) for s in range(70)]
    assert [s for s, share in enumerate(at) if share == 1.0] == [0, 10, 30]
    assert at[20] == pytest.approx(0.5)
    assert curves.warm_restarts(10**12 + 5, first=10) == pytest.approx(0.5)


GOYAL = LrSchedule(
    peak=3.2, start=0.1, warmup=6_405_835, total=115_305_030, warmup_kind="gradual", decay="multistep",
    options={"at": [38_435_010, 76_870_020, 102_493_360], "factor": 0.1},
)  # fmt: skip


def test_goyal_step_by_step() -> None:
    assert GOYAL.at(0) == 0.1
    assert GOYAL.at(781 * 8192) < 3.2
    assert GOYAL.at(782 * 8192) == 3.2
    assert GOYAL.at(38_435_009) == 3.2
    assert GOYAL.at(38_435_010) == pytest.approx(0.32)
    assert GOYAL.at(115_305_029) == pytest.approx(0.0032)


def test_constant_warmup_jumps() -> None:
    schedule = LrSchedule(peak=1.0, start=0.1, warmup=100, total=1000, warmup_kind="constant")
    assert [schedule.at(s) for s in (0, 99, 100, 999)] == [0.1, 0.1, 1.0, 1.0]


@pytest.mark.parametrize("decay", ["linear", "cosine", "poly"])
def test_decay_starts_at_the_peak_when_the_warmup_ends(decay: str) -> None:
    schedule = LrSchedule(peak=2.0, start=0.0, warmup=100, total=1000, warmup_kind="gradual", decay=decay)  # type: ignore[arg-type]
    assert schedule.at(50) == 1.0
    assert schedule.at(100) == 2.0
    assert schedule.at(1000) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("decay", "options", "expected"),
    [
        ("exponential", {"every": 100, "factor": 0.5}, 0.5),
        ("inverse_time", {"every": 100, "rate": 3.0}, 0.25),
        ("warm_restarts", {"first": 200}, 0.5),
        ("step", {"every": 200, "factor": 0.1}, 0.1),
        ("one_cycle", {"up": 300, "start": 0.0, "end": 0.0}, 0.5 * (1 - math.cos(math.pi * 200 / 300))),
    ],
)
def test_where_each_decay_counts_from(decay: str, options: dict[str, float], expected: float) -> None:
    warmup = 0 if decay == "one_cycle" else 100
    schedule = LrSchedule(
        peak=1.0,
        start=0.0,
        warmup=warmup,
        total=1000,
        warmup_kind="gradual",
        decay=decay,
        options=options,  # type: ignore[arg-type]
    )
    assert schedule.at(200) == pytest.approx(expected)


@given(st.dictionaries(st.integers(1, 100), st.integers(1, 40), max_size=5), st.integers(1, 40), st.integers(1, 150))
def test_steps_before_a_sample_are_those_of_a_walk(later: dict[int, int], first: int, samples: int) -> None:
    """Whatever the stages: closer than a batch, and with smaller batches too."""
    schedule = BatchSchedule(((0, first), *sorted(later.items())))
    seen = [0]
    while seen[-1] < samples:
        seen.append(seen[-1] + schedule.at(seen[-1]))
    assert schedule.before(samples) == (len(seen) - 1, seen[-2])
