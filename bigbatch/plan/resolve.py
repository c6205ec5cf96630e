"""resolve(config, world_size, dataset_size) -> Plan: every decision of large-batch training, in one pure function."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from bigbatch.config import ConfigError, Duration, RunConfig
from bigbatch.config import models as m
from bigbatch.schedules import BatchSchedule, LrSchedule, lr_scale
from bigbatch.schedules.scaling import SOURCES

from .exchange import check_exchange, describe_compression, describe_strategy
from .layout import choose_micro, choose_span
from .plan import Decision, Plan
from .ramp import SMITH, batch_ramp, check_ramp
from .warn import plan_warnings

GOYAL = "Goyal et al. 2017, arXiv:1706.02677"


def resolve(config: RunConfig, *, world_size: int, dataset_size: int) -> Plan:
    """Decide everything. ``dataset_size`` counts training samples. Raises ConfigError for what cannot be met."""
    _check_world(config, world_size)
    _check_clip(config)
    check_ramp(config)
    check_exchange(config)
    clock = _Clock.of(config, dataset_size)
    decisions: list[Decision] = []

    def decide(what: str, value: object, why: str, source: str = "recipe") -> None:
        decisions.append(Decision(what, f"{value:g}" if isinstance(value, float) else str(value), why, source))

    batch = config.batch.global_
    micro, why = choose_micro(config.batch, config.norm, world_size=world_size, debug=config.debug)
    accumulation = batch // (micro * world_size)
    decide(
        "global_batch",
        batch,
        f"batch.global; {world_size} × {micro} × {accumulation} (processes × micro × accumulation)",
    )
    decide("micro_batch", micro, why)
    decide(
        "accumulation",
        accumulation,
        "global batch / (processes × micro batch); gradients are exchanged once per update",
    )
    if isinstance(config.task, m.MaskedLM | m.CausalLM):
        span, why, source = None, "language models have no batch norm", "recipe"
    else:
        span, why, source = choose_span(config.norm, micro=micro, world_size=world_size)
    decide("bn_span", span if span else "none", why, source)

    decide("strategy", *describe_strategy(config.parallel, world_size=world_size))
    if config.parallel.compression != "none" and world_size > 1:
        decide("compression", *describe_compression(config.parallel))
    clip = config.clip
    if clip.kind != "none":
        decide("clip", f"{clip.kind} {clip.max:g}", "once per update, over the gradient summed over processes")
    decide("samples", clock.total, f"duration {config.duration} of {dataset_size} training samples")
    stages = clock.batches.stages
    if len(stages) > 1:
        decide(
            "batch_ramp",
            " → ".join([str(batch), *(f"{grown} at {start} samples" for start, grown in stages[1:])]),
            f"decay.by batch: grows {stages[1][1] // batch} times where the rate would fall; accumulation "
            f"{stages[-1][1] // (micro * world_size)} in the last stage",
            SMITH,
        )
    windows = f"{batch} to {stages[-1][1]}" if len(stages) > 1 else str(batch)
    steps = clock.steps_until(clock.total)
    decide("steps", steps, f"windows of {windows}; data.last is {config.data.last}: {clock.last_why}")

    schedule, scale = _rate(config, clock)
    base = config.optim.lr
    base_batch = config.scaling.base_batch or batch
    rule = config.scaling.rule
    why = f"{base:g} × {scale:g}: batch {batch} / base batch {base_batch}, {rule} rule"
    if rule == "none":
        why = "optim.lr as it stands: scaling.rule is none" + (
            f", base batch {base_batch} is not used" if config.scaling.base_batch else ""
        )
    decide("lr_peak", schedule.peak, why, SOURCES[rule])
    warmup_steps = clock.steps_until(schedule.warmup)
    if schedule.warmup:
        kind = {"gradual": "a straight line", "constant": "a constant"}[schedule.warmup_kind]
        source = f"{GOYAL}, section 2.2" if schedule.warmup_kind == "gradual" else "He et al. 2016, arXiv:1512.03385"
        decide("warmup", f"{schedule.warmup} samples", f"{kind} from {schedule.start:g} to {schedule.peak:g}", source)
        decide("warmup_steps", warmup_steps, "first step that starts after the warmup's samples")
    why, source = ", ".join(f"{k} {v}" for k, v in schedule.options.items()) or "no options", "recipe"
    if config.decay.by == "batch":
        falls = schedule.at(clock.total - 1) < schedule.peak
        then = " until the batch would pass batch.max, then it falls" if falls else ""
        why, source = f"{why}; the rate stays at its peak{then}", SMITH
    decide("decay", schedule.decay, why, source)
    stop = clock.part("run.stop_after", config.run.stop_after) if config.run.stop_after else clock.total
    if stop < clock.total:
        decide("stop", f"{stop} samples", f"run.stop_after {config.run.stop_after}: saves and stops, to go on later")
    every = {
        name: clock.interval(f"{name}.every", getattr(config, name).every)
        for name in ("eval", "checkpoint", "tracking")
    }
    for name, what in (("eval", "evaluations"), ("checkpoint", "checkpoints")):
        decide(
            what, f"every {every[name]} samples", f"{name}.every {getattr(config, name).every}, and after the last step"
        )
    check = config.parallel.check_every
    plan = Plan(
        world_size=world_size,
        global_batch=batch,
        micro_batch=micro,
        accumulation=accumulation,
        batches=clock.batches,
        bn_span=span,
        bn_groups_fixed=config.norm.kind == "batch" and config.norm.span != "micro",
        dataset_size=dataset_size,
        epoch_samples=clock.epoch,
        last=config.data.last,
        steps=steps,
        samples=clock.total,
        stop_samples=min(clock.total, stop),
        epochs=clock.total / clock.epoch,
        lr_rule=rule,
        lr_scale=scale,
        lr_base=base,
        lr_peak=schedule.peak,
        schedule=schedule,
        warmup_samples=schedule.warmup,
        warmup_steps=warmup_steps,
        eval_every=every["eval"],
        checkpoint_every=every["checkpoint"],
        track_every=every["tracking"],
        check_every=clock.interval("parallel.check_every", check) if check else None,
        warnings=(),
        decisions=tuple(decisions),
    )
    return plan_warnings(config, plan)


def _check_world(config: RunConfig, world_size: int) -> None:
    # Debug mode is one process that stands for all of a larger run's.
    expected = None if config.debug else config.parallel.expect_world_size
    if expected is not None and world_size != expected:
        raise ConfigError(
            f"parallel.expect_world_size = {expected}: {world_size} processes were started; start {expected} "
            f"(torchrun --nproc-per-node) or set parallel.expect_world_size={world_size}"
        )
    if config.debug and world_size != 1:
        raise ConfigError(f"debug = true: one process only, {world_size} were started; start without a launcher")


def _check_clip(config: RunConfig) -> None:
    clip = config.clip
    if clip.kind == "none" and clip.max is not None:
        raise ConfigError(
            f"clip.max = {clip.max}: clip.kind is none; choose norm, value or adaptive, or remove clip.max"
        )
    if clip.kind != "none" and clip.max is None:
        raise ConfigError(
            f"clip.max: not set, but clip.kind is {clip.kind}; give the largest value allowed, such as 1.0"
        )


@dataclass(frozen=True)
class _Clock:
    """Lengths of the run in samples and steps. ``uneven`` is the setting that makes steps differ in size, if any."""

    size: int
    batch: int
    epoch: int
    last: str
    total: int
    uneven: str
    batches: BatchSchedule

    @classmethod
    def of(cls, config: RunConfig, size: int) -> _Clock:
        batch, last = config.batch.global_, config.data.last
        if last != "cross" and batch > size:
            raise ConfigError(
                f"batch.global = {batch}: an epoch has {size} samples, with data.last={last} no window is whole; "
                f"use data.last=cross or a batch of at most {size}"
            )
        epoch = size // batch * batch if last == "drop" else size
        uneven = "decay.by=batch" if config.decay.by == "batch" else "data.last=short" if last == "short" else ""
        empty = cls(size, batch, epoch, last, 0, uneven, BatchSchedule(((0, batch),)))
        try:
            total = empty.samples(config.duration)
        except ValueError as error:
            raise ConfigError(f"duration = {config.duration}: {error}") from None
        if last == "drop":
            total = math.ceil(total / batch) * batch
        if total <= 0:
            raise ConfigError(f"duration = {config.duration}: the run has no step; make it longer")
        if total < batch:
            raise ConfigError(
                f"duration = {config.duration}: {total} samples are less than a batch.global of {batch}; lengthen it"
            )
        clock = replace(empty, total=total)
        if config.decay.by == "lr":
            return clock
        options = _decay_options(config, clock, 0)
        milestones = options.get("at") or range(options["every"], total, options["every"])
        ramp = batch_ramp(config.batch, factor=options["factor"], milestones=milestones, total=total)
        return replace(clock, batches=ramp)

    def interval(self, key: str, duration: Duration) -> int:
        """Samples from one event to the next."""
        if duration.unit == "st" and self.uneven:
            self._one_step(key, duration)
            return 1
        return self.part(key, duration)

    def part(self, key: str, duration: Duration) -> int:
        """A part of the run in samples. ConfigError names ``key`` where it has no length."""
        if not duration.value:
            raise ConfigError(f"{key} = {duration}: must be longer than 0")
        if duration.unit == "st" and self.uneven == "decay.by=batch":
            self._one_step(key, duration)
        return self.samples(duration, whole=True)

    def _one_step(self, key: str, duration: Duration) -> None:
        if duration.value != 1:
            raise ConfigError(f"{key} = {duration}: with {self.uneven} steps differ in size; use 1st, or ep, ex or %")

    def samples(self, duration: Duration, *, whole: bool = False) -> int:
        """A duration in samples; a percentage is one of the ``whole`` run."""
        if duration.unit == "st" and self.last == "short":
            per_epoch = math.ceil(self.epoch / self.batch)
            epochs, steps = divmod(math.ceil(duration.value), per_epoch)
            return epochs * self.epoch + min(steps * self.batch, self.epoch)
        return duration.samples(epoch=self.epoch, batch=self.batch, whole=self.total if whole else None)

    def steps_until(self, samples: int) -> int:
        """The number of steps that start before ``samples``."""
        if self.last == "short":
            epochs, rest = divmod(samples, self.epoch)
            return epochs * math.ceil(self.epoch / self.batch) + math.ceil(rest / self.batch)
        return self.batches.before(samples)[0]

    @property
    def last_why(self) -> str:
        return {
            "cross": "windows cross epochs, only the run's last can be short",
            "short": "each epoch's last window is short",
            "drop": f"{self.size - self.epoch} samples of each epoch are left out",
        }[self.last]


def _rate(config: RunConfig, clock: _Clock) -> tuple[LrSchedule, float]:
    rule, base_batch = config.scaling.rule, config.scaling.base_batch
    if rule != "none" and base_batch is None:
        raise ConfigError(
            f"scaling.base_batch: not set, but scaling.rule is {rule}; give the global batch optim.lr was tuned for"
        )
    scale = lr_scale(rule, batch=clock.batch, base_batch=base_batch or clock.batch)
    peak = config.optim.lr * scale
    warmup = _warmup_samples(config, clock)
    start = {"base": config.optim.lr, "zero": 0.0}.get(str(config.warmup.start), config.warmup.start)
    decay, options = config.decay.kind, _decay_options(config, clock, warmup)
    if config.decay.by == "batch":
        options["grown"] = len(clock.batches.stages) - 1
    return (
        LrSchedule(
            peak=peak,
            start=float(start) if warmup else peak,
            warmup=warmup,
            total=clock.total,
            warmup_kind=config.warmup.kind,
            decay=decay,
            options=options,
        ),
        scale,
    )


def _warmup_samples(config: RunConfig, clock: _Clock) -> int:
    warmup = config.warmup
    if warmup.kind == "none":
        if warmup.duration is not None:
            raise ConfigError(f"warmup.duration = {warmup.duration}: warmup.kind is none; choose gradual or constant")
        if warmup.start != "base":
            raise ConfigError(f"warmup.start = {warmup.start}: warmup.kind is none; choose gradual or constant")
        return 0
    if warmup.duration is None:
        raise ConfigError(
            f"warmup.duration: not set, but warmup.kind is {warmup.kind}; give a length such as 5ep or 10%"
        )
    samples = clock.part("warmup.duration", warmup.duration)
    if samples >= clock.total:
        raise ConfigError(
            f"warmup.duration = {warmup.duration}: {samples} samples of warmup leave nothing of a run of {clock.total} "
            f"({config.duration}); shorten it (a percentage such as 10%) or lengthen duration"
        )
    return samples


def _decay_options(config: RunConfig, clock: _Clock, warmup: int) -> dict[str, Any]:
    """The decay's own options, with every duration in samples."""
    decay = config.decay

    def samples(key: str, duration: Duration) -> int:
        count = clock.part(f"decay.{key}", duration)
        if count >= clock.total and not isinstance(decay, m.Exponential | m.InverseTime):
            raise ConfigError(
                f"decay.{key} = {duration}: {count} samples, but the run ends at {clock.total}; "
                "use a shorter length or a percentage"
            )
        return count

    match decay:
        case m.Constant():
            return {}
        case m.Step() | m.Exponential():
            return {"every": samples("every", decay.every), "factor": decay.factor}
        case m.InverseTime():
            return {"every": samples("every", decay.every), "rate": decay.rate}
        case m.MultiStep():
            at = [samples("at", duration) for duration in decay.at]
            if at != sorted(set(at)):
                raise ConfigError(f"decay.at = {[str(d) for d in decay.at]}: milestones must ascend")
            return {"at": at, "factor": decay.factor}
        case m.OneCycle():
            if warmup:
                raise ConfigError("warmup.kind: one_cycle rises by itself; set warmup.kind=none")
            return {"up": samples("up", decay.up), "start": decay.start, "end": decay.end}
        case m.WarmRestarts():
            return {"first": samples("first", decay.first), "multiply": decay.multiply, "end": decay.end}
        case _:
            return decay.model_dump(exclude={"kind", "by"})
