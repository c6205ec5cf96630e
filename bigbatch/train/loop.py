"""A run from its first step, or from its newest checkpoint, to its summary."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from bigbatch.config import ConfigError, RunConfig, dump_config
from bigbatch.dist import StopSignal
from bigbatch.measure import Throughput
from bigbatch.tracking import Trackers, build_trackers

from .checkpoint import Checkpoints, Saved
from .diagnose import diagnose
from .evaluate import evaluate
from .guard import check_ranks
from .state import Clock, Parts, Preempted, RunError, StepReport
from .step import train_step

SUMMARY, PREEMPTED = "summary.json", "preempted.json"
FREE_ON_RESUME = ("run", "eval", "checkpoint", "tracking", "parallel", "debug")
"""Sections that may change when a run goes on; everything else defines which run it is."""


def train(parts: Parts, stop: StopSignal) -> dict[str, Any]:
    """Run to the end of the plan and return the summary, which is also written to ``run.dir/summary.json``.

    Goes on from the newest whole checkpoint in ``run.dir``. A run that ``run.stop_after`` ends early has neither
    metrics nor a summary file yet. A process that is asked to ``stop`` stops them all after the same step: they save,
    leave ``run.dir/preempted.json`` and raise Preempted. Raises RunError where the run cannot go on and ConfigError
    where the directory holds another run.
    """
    run = Path(parts.config.run.dir)
    settings = parts.config.checkpoint
    checkpoints = Checkpoints(run / "checkpoints", keep=settings.keep, best=settings.best, best_is=settings.best_is)
    saved, damage = _find(parts, checkpoints)
    clock = _restore(parts, saved) if saved else Clock()
    if parts.plan.check_every:
        check_ranks(parts, clock, parts.model.state_dict())
    complete = parts.runtime.agree(clock.samples >= parts.plan.samples and (run / SUMMARY).is_file())
    if complete:
        return json.loads((run / SUMMARY).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    seconds, late = (float(saved.state["seconds"]), bool(saved.state.get("late"))) if saved else (0.0, False)
    if parts.runtime.rank == 0:
        _write_inputs(parts, run)
        if saved:
            checkpoints.set_aside(saved)
    trackers = build_trackers(
        parts.config,
        run_dir=run,
        resume_step=clock.step if saved else None,
        total_steps=parts.plan.steps,
        total_samples=parts.plan.samples,
        rank=parts.runtime.rank,
    )
    trackers.start(parts.config.model_dump(mode="json", by_alias=True), asdict(parts.plan))
    _announce(trackers, clock, saved, damage, parts)
    meter = Throughput(seconds=seconds)
    try:
        validation = _steps(parts, clock, trackers, checkpoints, meter, stop, late=late)
        summary = _finish(parts, clock, trackers, meter, validation)
    except Preempted:
        trackers.finish("preempted")
        raise
    except BaseException:
        trackers.finish("failed")
        raise
    trackers.finish("done")
    return summary


def _steps(
    parts: Parts,
    clock: Clock,
    trackers: Trackers,
    checkpoints: Checkpoints,
    meter: Throughput,
    stop: StopSignal,
    *,
    late: bool,
) -> dict[str, float] | None:
    """Take every step of the plan; the metrics of the last step's evaluation, or None where no step was left.

    ``late``: the last step's evaluation is still to be done.
    """
    plan, metrics = parts.plan, None
    if late:
        metrics = _validate(parts, clock, trackers)
        _save(parts, clock, checkpoints, metrics=metrics, seconds=meter.seconds)
    meter.resume()
    while clock.samples < plan.stop_samples:
        before, after = clock.samples, clock.samples + plan.window(clock.samples)

        def due(every: int, before: int = before, after: int = after) -> bool:
            return plan.is_due(every, before=before, after=after)

        report = train_step(parts, samples=before, stop=stop.asked is not None)
        clock.samples, clock.step = after, clock.step + 1
        meter.add(report.global_batch)
        if due(plan.track_every):
            trackers.log(_step_event(parts, clock, report, meter.read()))
        _guard(parts, clock, report)
        meter.pause()
        if plan.check_every and due(plan.check_every):
            # Running statistics are each process's own until they are merged.
            check_ranks(parts, clock, dict(parts.model.named_parameters()))
        # An evaluation may take longer than there is left; whoever goes on makes up for it.
        late = due(plan.eval_every) and report.stop
        metrics = _validate(parts, clock, trackers) if due(plan.eval_every) and not late else None
        if due(plan.checkpoint_every) or after >= plan.stop_samples or report.stop:
            _save(parts, clock, checkpoints, metrics=metrics, seconds=meter.seconds, late=late)
        if report.stop:
            _preempted(parts, clock, stop)
        meter.resume()
    meter.pause()
    return metrics


def _validate(parts: Parts, clock: Clock, trackers: Trackers) -> dict[str, float]:
    metrics = evaluate(parts, "validation")
    trackers.log({"event": "eval", "split": "validation", **_where(clock), **metrics})
    return metrics


def _guard(parts: Parts, clock: Clock, report: StepReport) -> None:
    clock.skipped_in_a_row = clock.skipped_in_a_row + 1 if report.skipped else 0
    limit = parts.config.run.nonfinite_limit
    if clock.skipped_in_a_row >= limit:
        way_out = "lower optim.lr, lengthen the warmup or set clip.kind=norm"
        if not parts.task.weight_is_count:
            way_out += ", or see whether all weights of a batch can be 0"
        raise RunError(
            f"step {clock.step}: the gradient was not finite in {limit} steps in a row (run.nonfinite_limit): "
            f"stopped at learning rate {report.lr:g}: {diagnose(parts, clock.samples - report.global_batch)}: {way_out}"
        )


def _step_event(parts: Parts, clock: Clock, report: StepReport, rate: float) -> dict[str, Any]:
    event = {
        "event": "step",
        **_where(clock),
        "epoch": clock.samples / parts.plan.epoch_samples,
        "loss": report.loss,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "global_batch": report.global_batch,
        "samples_per_second": rate,
    }
    if report.skipped:
        event["skipped"] = True
    if parts.scale:
        event["loss_scale"] = parts.scale.value
    return event


def _where(clock: Clock) -> dict[str, int]:
    return {"step": clock.step, "samples": clock.samples}


# -------------------------------------------------------------------------------------- leaving and coming back


def _save(
    parts: Parts,
    clock: Clock,
    checkpoints: Checkpoints,
    *,
    metrics: dict[str, float] | None,
    seconds: float,
    late: bool = False,
) -> None:
    parts.stats.merge(parts.runtime.sum, parts.runtime.rank)
    if parts.plan.check_every:
        check_ranks(parts, clock, parts.model.state_dict())
    model, optimizer = parts.strategy.model_state(), parts.strategy.optimizer_state()
    if parts.runtime.rank:
        return
    state = {
        **asdict(clock),
        "seconds": seconds,
        "metrics": metrics,
        "late": late,
        "loss_scale": asdict(parts.scale) if parts.scale else None,
        "recipe": parts.config.model_dump(mode="json", by_alias=True),
    }
    checkpoints.save(clock.step, model=model, optimizer=optimizer, state=state)


def _preempted(parts: Parts, clock: Clock, stop: StopSignal) -> NoReturn:
    """Leave a note that the run is to go on, for launchers, which do not hand on exit codes."""
    run = Path(parts.config.run.dir)
    if parts.runtime.rank == 0:
        part = run / f".{PREEMPTED}.part"
        part.write_text(json.dumps({"signal": stop.asked, **_where(clock)}), encoding="utf-8")
        part.replace(run / PREEMPTED)
    parts.runtime.agree(None)  # none leaves before the note is there
    raise Preempted(f"{run}: asked to stop, saved after step {clock.step}; the same command goes on")


def _find(parts: Parts, checkpoints: Checkpoints) -> tuple[Saved | None, Sequence[str]]:
    """Rank 0 looks and all use what it found, so that no two processes go on from different steps."""
    found: Any = None
    if parts.runtime.rank == 0:
        try:
            found = checkpoints.newest()
        except RunError as error:
            found = error
        except (OSError, ValueError) as error:
            found = ConfigError(f"run.dir = {parts.config.run.dir!r}: no directory can have this name ({error})")
    found = parts.runtime.agree(found)
    if isinstance(found, Exception):
        raise found
    return found  # type: ignore[no-any-return]


def _restore(parts: Parts, saved: Saved) -> Clock:
    state = saved.state
    _check_same_run(parts.config, state["recipe"], saved.path)
    parts.strategy.load(saved.model(), saved.optimizer())
    if parts.scale and state["loss_scale"]:
        parts.scale.__dict__.update(state["loss_scale"])
    return Clock(**{name: state[name] for name in asdict(Clock())})


def _identity(config: RunConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json", by_alias=True, exclude=set(FREE_ON_RESUME))
    del tree["batch"]["micro"], tree["batch"]["micro_limit"]
    for where in ("path", "download"):
        tree["data"].pop(where, None)
    # Rounded gradients are another run; how they lie over the processes is not.
    tree["parallel"] = {"compression": config.parallel.compression}
    return json.loads(json.dumps(tree))  # type: ignore[no-any-return]


def _check_same_run(config: RunConfig, recipe: dict[str, Any], path: Path) -> None:
    # Settings that were not there yet had the effect of their defaults.
    try:
        theirs = _flat(_identity(RunConfig.model_validate(recipe)))
    except ValueError as error:
        raise ConfigError(f"{path}: its recipe is of another version ({error}); give a new run.dir") from None
    ours = _flat(_identity(config))
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            raise ConfigError(
                f"{key} = {ours.get(key)!r}: the run in {path.parent.parent} was started with {theirs.get(key)!r}; "
                "set it back to go on, or give a new run.dir"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _write_inputs(parts: Parts, run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        # The run is not complete, whatever another one may have left here.
        (run / SUMMARY).unlink(missing_ok=True)
        (run / PREEMPTED).unlink(missing_ok=True)
        (run / "config.yaml").write_text(dump_config(parts.config), encoding="utf-8")
        (run / "plan.json").write_text(parts.plan.to_json(), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"run.dir = {run}: cannot be written ({error}); give another directory") from None


def _announce(trackers: Trackers, clock: Clock, saved: Saved | None, damage: Sequence[str], parts: Parts) -> None:
    for message in damage:
        trackers.log({"event": "warning", "code": "damaged_checkpoint", **_where(clock), "message": message})
    if saved:
        trackers.log({"event": "resume", **_where(clock), "checkpoint": saved.path.name})
        return
    for warning in (*parts.plan.warnings, *parts.warnings):
        trackers.log({"event": "warning", "code": warning.code, **_where(clock), "message": warning.message})


def _finish(
    parts: Parts, clock: Clock, trackers: Trackers, meter: Throughput, validation: dict[str, float] | None
) -> dict[str, Any]:
    """The summary. The test part is read here, once, at the end of the plan, and nothing is chosen by it."""
    summary: dict[str, Any] = {
        "steps": clock.step,
        "samples": clock.samples,
        "seconds": meter.seconds,
        "world_size": parts.runtime.world_size,
    }
    if clock.samples < parts.plan.samples:
        return summary
    validation = validation or evaluate(parts, "validation")
    if not math.isfinite(validation["loss"]):
        raise RunError(
            f"the run ended with a validation loss of {validation['loss']}: lower optim.lr or lengthen the warmup"
        )
    test = evaluate(parts, "test")
    trackers.log({"event": "eval", "split": "test", **_where(clock), **test})
    summary["metrics"] = {**test, **{f"validation_{name}": value for name, value in validation.items()}}
    summary["parameters_sha256"] = parameters_sha256(parts)
    # Written last: a run that has a summary is complete.
    if parts.runtime.rank == 0:
        (Path(parts.config.run.dir) / SUMMARY).write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return summary


def parameters_sha256(parts: Parts) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers, in the order of their names.

    A collective; every process gets rank 0's.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(parts.strategy.model_state().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return str(parts.runtime.agree(digest.hexdigest()))
