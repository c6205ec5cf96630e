"""Is a recipe the same run in every layout? Runs its first steps in several, and compares."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

from torch import Tensor

from bigbatch.config import ConfigError, RunConfig
from bigbatch.dist import RankError, run_processes
from bigbatch.plan import Plan, resolve
from bigbatch.plan.layout import divisors, nearest

from .replay import Role, Trace, replay

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-3}
"""Largest relative difference that passes for rounding."""
JOLTED, CHAOS = "jolted", 10.0
"""So does this many times the difference that rounding of the initial weights has made to anything by then: a ReLU
that rounding tips over changes a gradient by a thousandth, and steps at a high rate multiply that."""

Differences = dict[str, list[tuple[float, str]]]
"""Of each thing compared: the relative difference at each step, and what differs."""


@dataclass(frozen=True)
class Layout:
    """Processes × accumulation; the micro batch is what is left of the global one. ``workers`` beside each process
    read the data; None: as many as the recipe says."""

    processes: int
    accumulation: int
    workers: int | None = None

    @classmethod
    def parse(cls, text: str) -> Layout:
        """``"2x4"``, ``"2x4w3"``. Raises ConfigError."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:w(\d+))?", text.strip())
        if match is None:
            raise ConfigError(
                f"--layouts: {text!r} is no layout; write processes x accumulation, such as 1x1,2x4, and w and the "
                "number of data workers behind it where that is to differ too, such as 2x4w3"
            )
        return cls(int(match[1]), int(match[2]), int(match[3]) if match[3] else None)

    def __str__(self) -> str:
        return f"{self.processes}x{self.accumulation}" + ("" if self.workers is None else f"w{self.workers}")


@dataclass(frozen=True)
class Finding:
    """How far a layout is from the first in one respect; where that is no rounding, its first such step, and what."""

    what: str
    layout: str
    difference: float
    step: int | None = None
    where: str = ""


@dataclass(frozen=True)
class Verdict:
    steps: int
    last_window: int
    tolerance: float
    layouts: tuple[str, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def same(self) -> bool:
        return all(finding.step is None for finding in self.findings)

    def to_json(self) -> str:
        """The verdict as an indented JSON object; a difference without a size (other samples, not finite) is null."""
        tree = dataclasses.asdict(self)
        for finding in tree["findings"]:
            finding["difference"] = finding["difference"] if math.isfinite(finding["difference"]) else None
        return json.dumps({**tree, "same": self.same}, indent=2, ensure_ascii=False, allow_nan=False)

    def text(self, title: str) -> str:
        """A table of what was compared, the first step of each difference, and the verdict in words."""
        whats = list(dict.fromkeys(finding.what for finding in self.findings))
        cells = {(finding.what, finding.layout): finding for finding in self.findings}
        width = max(map(len, whats)) + 2
        lines = [f"{title}: {self.steps} steps, the last window of {self.last_window} samples"]
        lines.append(" " * width + "".join(f"{name:>10}" for name in self.layouts))
        for what in whats:
            row = (cells[what, name] for name in self.layouts)
            lines.append(f"{what:<{width}}" + "".join(f"{_cell(finding):>10}" for finding in row))
        far = sorted((f for f in self.findings if f.step), key=lambda f: (self.layouts.index(f.layout), f.step))
        lines += [f"{f.layout}, step {f.step}: {f.what}: {f.where}" for f in far]
        lines += [f"note: {note}" for note in self.notes]
        fine = f"differences above {self.tolerance:g} are no rounding"
        if JOLTED in self.layouts:
            fine = f"rounding is up to {self.tolerance:g}, or {CHAOS:g} times what the jolted weights have made by then"
        same = "the same run" if self.same else "NOT shown to be the same run"
        lines.append(f"{same} in all layouts{': see the note' if self.notes and not self.same else ''} ({fine})")
        return "\n".join(lines)


def _cell(finding: Finding) -> str:
    if finding.step:
        return "NO" if finding.what == "finite" else "DIFFERS"
    if finding.what == "finite":
        return "yes"
    return f"{finding.difference:.1e}" if finding.difference else "equal"


def verify(
    config: RunConfig,
    *,
    layouts: Sequence[Layout],
    steps: int,
    dataset_size: int,
    say: Callable[[str], None],
    worker: Callable[..., Trace] = replay,
) -> Verdict:
    """Run the first ``steps`` steps in each layout on real gloo processes and hold them against the first layout's.

    The rates are those of the whole run; the last of the steps has a short window, of a third of its batch and one.
    ``config.precision`` is fp64 or fp32. Where something differs by more than its tolerance, the first layout runs once
    more from jolted weights, to see what rounding alone does to the recipe. Raises ConfigError for a layout that the
    recipe cannot have, and RankError where a process fails. ``worker`` is what each process runs. The parameters of
    every step lie in a temporary directory meanwhile.
    """
    if config.precision not in TOLERANCE:
        raise ConfigError(f"precision = {config.precision}: rounds too much to verify with; use precision=fp64 or fp32")
    if len(set(layouts)) < 2:
        raise ConfigError("--layouts: nothing to compare; give two or more, such as 1x1,1x4")
    if steps < 2:
        raise ConfigError(
            f"--steps = {steps}: the last window is short, and before it comes a whole one; give 2 or more"
        )
    tolerance = TOLERANCE[config.precision]
    jobs = {str(layout): _job(config, layout, steps=steps, dataset_size=dataset_size) for layout in layouts}
    first, *others = jobs
    with tempfile.TemporaryDirectory(prefix="bigbatch-verify-") as folder:

        def run(name: str, role: Role) -> Trace:
            start, (settings, plan) = time.monotonic(), jobs[first if role == "jolted" else name]
            job = (settings, plan, Path(folder), role)
            try:
                trace: Trace = run_processes(plan.world_size, worker, *job, timeout=settings.parallel.timeout)[0]
            except RankError as error:
                if isinstance(error.__cause__, ConfigError):
                    raise error.__cause__ from None
                raise
            say(f"{name}: {plan.steps} steps in {time.monotonic() - start:.1f} s")
            return trace

        known = run(first, "reference")
        traces = {first: known, **{name: run(name, "layout") for name in others}}
        found = _compare(traces, known, limits=[tolerance] * len(known.lr))
        if {finding.what for finding in found if finding.step} & _differences(known, known).keys():
            traces[JOLTED] = run(JOLTED, "jolted")
            # A loss can be near by chance, so each thing is allowed what the jolt has done to any.
            moved = zip(*_differences(traces[JOLTED], known).values(), strict=True)
            chaos = accumulate((max(size for size, _ in step) for step in moved), max)
            found = _compare(traces, known, limits=[max(tolerance, CHAOS * size) for size in chaos])
    plan = jobs[first][1]
    last = plan.samples - _start_of_last(plan, plan.steps)
    notes = dict.fromkeys(_notes([plan for _, plan in jobs.values()], traces))
    if config.parallel.compression != "none":
        notes["parallel.compression rounds what each process sends; set parallel.compression=none"] = None
    return Verdict(plan.steps, last, tolerance, tuple(traces), tuple(found), tuple(notes))


def _notes(plans: list[Plan], traces: dict[str, Trace]) -> Iterable[str]:
    """What about the recipe depends on the layout, or was not reached, and what to set."""
    notes = dict.fromkeys(note for trace in traces.values() for note in trace.notes)
    plan, micros = plans[0], {plan.micro_batch for plan in plans}
    if (
        any(trace.has_statistics for trace in traces.values())
        and plan.bn_span
        and not plan.bn_groups_fixed
        and len(micros) > 1
    ):
        where = "batch norm is over each micro batch, whose size follows the layout"
        notes[f"norm.span = micro: {where}; set norm.span={math.gcd(*micros)}"] = None
    for grows, _ in plan.batches.stages[1:]:
        if grows >= plan.samples:
            steps = plan.batches.before(grows)[0] + 2
            notes[f"the batch grows at {grows} samples, after these steps; --steps {steps} has it"] = None
    return notes


def _job(config: RunConfig, layout: Layout, *, steps: int, dataset_size: int) -> tuple[RunConfig, Plan]:
    """The recipe and plan of a layout, which ends with the short window."""
    parts = layout.processes * layout.accumulation
    if config.batch.global_ % parts:
        raise ConfigError(
            f"--layouts: batch.global = {config.batch.global_} does not divide by {layout}; give layouts whose "
            f"products divide it, such as {nearest(parts, divisors(config.batch.global_))}x1"
        )
    batch = config.batch.model_copy(update={"micro": config.batch.global_ // parts})
    workers = config.data.workers if layout.workers is None else layout.workers
    data = config.data.model_copy(update={"workers": workers})
    config = config.model_copy(update={"batch": batch, "data": data})
    plan = resolve(config, world_size=layout.processes, dataset_size=dataset_size)
    steps = min(steps, plan.steps)
    start = _start_of_last(plan, steps)
    end = start + min(plan.window(start), plan.batch(start) // 3 + 1)
    return config, dataclasses.replace(plan, samples=end, stop_samples=end, steps=steps)


def _start_of_last(plan: Plan, steps: int) -> int:
    samples = 0
    for _ in range(steps - 1):
        samples += plan.window(samples)
    return samples


def _compare(traces: dict[str, Trace], known: Trace, *, limits: list[float]) -> list[Finding]:
    return list(chain.from_iterable(_findings(name, trace, known, limits) for name, trace in traces.items()))


def _findings(layout: str, ours: Trace, known: Trace, limits: list[float]) -> list[Finding]:
    """In the order in which one thing follows from another: the first row that differs is nearest to the cause.

    ``limits``: the largest relative difference that is rounding, at each step.
    """

    def equal(what: str, tell: Callable[[int], str | None]) -> Finding:
        told = enumerate((tell(step) for step in range(len(known.lr))), 1)
        return next((Finding(what, layout, math.inf, step, text) for step, text in told if text), same(what))

    def same(what: str) -> Finding:
        return Finding(what, layout, 0.0)

    def near(what: str, sizes: list[tuple[float, str]]) -> Finding:
        steps = enumerate(zip(sizes, limits, strict=True), 1)
        worst = max(size for size, _ in sizes)
        if layout == JOLTED:
            return Finding(what, layout, worst)
        far = (
            (step, f"{text}; relative difference {size:.1e}") for step, ((size, text), limit) in steps if size > limit
        )
        return Finding(what, layout, worst, *next(far, ()))

    return [
        equal("sample ids", lambda step: _other_sample(ours.ids[step], known.ids[step])),
        equal("inputs", lambda step: _other_input(ours.inputs[step], known.inputs[step])),
        *(near(what, sizes) for what, sizes in _differences(ours, known).items()),
        Finding("ranks", layout, math.inf, *ours.ranks) if ours.ranks else same("ranks"),
        equal("finite", lambda step: "nothing was learnt from then on" if ours.skipped[step] else None),
    ]


def _differences(ours: Trace, known: Trace) -> Differences:
    """What is compared up to rounding."""

    def numbers(mine: list[float], its: list[float]) -> list[tuple[float, str]]:
        return [(_relative(a, b), f"{a:.9g} instead of {b:.9g}") for a, b in zip(mine, its, strict=True)]

    return {
        "learning rate": numbers(ours.lr, known.lr),
        "loss": numbers(ours.loss, known.loss),
        "gradient norm": numbers(ours.grad_norm, known.grad_norm),
        "parameters": ours.parameters,
        "running statistics": ours.statistics,
    }


def _relative(a: float, b: float) -> float:
    if a == b or (a != a and b != b):
        return 0.0
    size = abs(a - b) / max(abs(b), sys.float_info.min)
    return size if size == size else math.inf


def _other_sample(ours: Tensor, known: Tensor) -> str | None:
    if len(ours) != len(known):
        return f"{len(ours)} samples instead of {len(known)}"
    if ours.equal(known):
        return None
    place = int((ours != known).any(1).nonzero()[0])
    (sample, epoch), (other, its) = ours[place].tolist(), known[place].tolist()
    return f"position {place} is sample {sample} of epoch {epoch} instead of sample {other} of epoch {its}"


def _other_input(ours: Tensor, known: Tensor) -> str | None:
    if len(ours) != len(known) or ours.equal(known):
        return None
    places = (ours != known).nonzero().flatten().tolist()
    return f"position {places[0]} and {len(places) - 1} more: the same sample looks otherwise, or has another target"
