"""A run from its first step, or from its newest checkpoint, to its summary."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from safetensors.torch import save

from bigbatch.config import dump_config
from bigbatch.measure import Throughput
from bigbatch.signals import StopSignal
from bigbatch.tracking import Trackers, build_trackers

from .checkpoint import Checkpoints
from .diagnose import NAMED, diagnose
from .evaluate import evaluate, unreadable
from .finetune import start
from .guard import check_ranks
from .lease import Lease
from .resume import find, on_rank_0, restore
from .saved import PREPROCESS, Saved
from .state import Clock, Parts, Preempted, RunError, StepReport
from .step import train_step, upcoming

SUMMARY, PREEMPTED = "summary.json", "preempted.json"
Metrics = dict[str, float]


@dataclass(frozen=True)
class Session:
    """A run under way: its parts, where it is, who writes, and who listens."""

    parts: Parts
    clock: Clock
    stop: StopSignal
    lease: Lease
    checkpoints: Checkpoints
    trackers: Trackers
    meter: Throughput
    unreadable: dict[str, str]

    def log(self, event: str, **more: Any) -> None:
        where = {"step": self.clock.step, "samples": self.clock.samples}
        self.trackers.log({"event": event, **where, **more})


def train(parts: Parts, stop: StopSignal) -> dict[str, Any]:
    """Run to the end of the plan and return the summary, which is also written to ``run.dir/summary.json``.

    Owns ``run.dir`` meanwhile, after waiting for a former owner to end, and goes on from the newest whole checkpoint
    there. A run that ``run.stop_after`` ends early has neither metrics nor a summary file yet. A process that is asked
    to ``stop`` stops them all after the same step: they save, leave ``run.dir/preempted.json`` and raise Preempted.
    Raises RunError where the run cannot go on and ConfigError where the directory holds another run.
    """
    lease = Lease(Path(parts.config.run.dir), seconds=parts.config.run.lease)
    try:
        return _train(parts, stop, lease)
    finally:
        lease.release()


def _train(parts: Parts, stop: StopSignal, lease: Lease) -> dict[str, Any]:
    run, settings = Path(parts.config.run.dir), parts.config.checkpoint
    checkpoints = Checkpoints(
        run / "checkpoints",
        keep=settings.keep,
        best=settings.best,
        best_is=settings.best_is,
        write=settings.write,
        check=lease.check,
    )
    saved, damage = find(parts, checkpoints, lease)
    clock = restore(parts, saved) if saved else start(parts)
    if parts.plan.check_every:
        check_ranks(parts, clock, parts.model.state_dict())

    def begin() -> dict[str, Any] | None:
        """The summary of a run that is complete; else all is written down for one that is not."""
        (run / PREEMPTED).unlink(missing_ok=True)
        if clock.samples >= parts.plan.samples and (run / SUMMARY).is_file():
            return json.loads((run / SUMMARY).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
        lease.begin(clock.step)
        # The run is not complete, whatever another one may have left here.
        (run / SUMMARY).unlink(missing_ok=True)
        _write(run / "config.yaml", dump_config(parts.config))
        _write(run / "plan.json", parts.plan.to_json())
        if parts.preprocessing:
            _write(run / PREPROCESS, save(parts.preprocessing.state))
        if tokenizer := parts.loader.dataset.tokenizer:
            _write(run / "tokenizer.json", tokenizer)
        checkpoints.set_aside(saved)
        return None

    if complete := on_rank_0(parts, begin):
        return complete
    trackers = build_trackers(
        parts.config,
        run_dir=run,
        resume_step=clock.step if saved else None,
        total_steps=parts.plan.steps,
        total_samples=parts.plan.samples,
        rank=parts.runtime.rank,
    )
    trackers.start(parts.config.model_dump(mode="json", by_alias=True), asdict(parts.plan))
    meter = Throughput(seconds=float(saved.state["seconds"]) if saved else 0.0)
    missed = dict(saved.state.get("unreadable", {})) if saved else {}
    session = Session(parts, clock, stop, lease, checkpoints, trackers, meter, missed)
    _announce(session, saved, damage)
    try:
        validation = _steps(session, late=bool(saved and saved.state.get("late")))
        summary = _finish(session, validation)
    except Preempted:
        trackers.finish("preempted")
        raise
    except BaseException:
        checkpoints.wait()  # a save in flight is not lost with the run
        _log_saves(session)
        trackers.finish("failed")
        raise
    trackers.finish("done")
    return summary


def _steps(session: Session, *, late: bool) -> Metrics | None:
    """Take every step of the plan; the metrics of the last step's evaluation, or None where no step was left.

    ``late``: the evaluation of the step that the run goes on from is still to be done.
    """
    parts, clock, meter = session.parts, session.clock, session.meter
    plan, progress, metrics = parts.plan, parts.runtime.progress, None
    progress.step = clock.step
    if late:
        metrics = _validate(session)
        _save(session, metrics)
    parts.loader.follow(upcoming(parts, clock.samples))
    meter.resume()
    while clock.samples < plan.stop_samples:
        before, after = clock.samples, clock.samples + plan.window(clock.samples)

        def due(every: int, before: int = before, after: int = after) -> bool:
            return plan.is_due(every, before=before, after=after)

        report = train_step(parts, samples=before, stop=session.stop.asked is not None)
        clock.samples, clock.step = after, clock.step + 1
        progress.step = clock.step
        progress.enter("log")
        meter.add(report.global_batch)
        if due(plan.track_every):
            _log_step(session, report)
        _look_around(session)
        _guard(session, report)
        meter.pause()
        if plan.check_every and due(plan.check_every):
            # Running statistics are each process's own until they are merged.
            check_ranks(parts, clock, dict(parts.model.named_parameters()))
        # An evaluation may take longer than there is left; whoever goes on makes up for it.
        late = due(plan.eval_every) and report.stop
        metrics = _validate(session) if due(plan.eval_every) and not late else None
        if due(plan.checkpoint_every) or after >= plan.stop_samples or report.stop:
            _save(session, metrics, late=late)
        if report.stop:
            _leave(session)
        meter.resume()
    meter.pause()
    _settle(session)
    return metrics


def _validate(session: Session) -> Metrics:
    metrics = evaluate(session.parts, "validation")
    session.log("eval", split="validation", **metrics)
    return metrics


def _name_unreadable(session: Session) -> None:
    """Name, once in a run, what could not be read."""
    found = unreadable(session.parts)
    if new := [f"{name} ({reason})" for name, reason in found.items() if name not in session.unreadable]:
        session.unreadable.update(found)
        more = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
        message = f"passed over: {len(new)} samples that cannot be read: {'; '.join(new[:NAMED])}{more}"
        session.log("warning", code="unreadable", count=len(new), message=message)


def _log_step(session: Session, report: StepReport) -> None:
    parts, more = session.parts, dict[str, Any]()
    if report.skipped:
        more["skipped"] = True
    if parts.scale:
        more["loss_scale"] = parts.scale.value
    session.log(
        "step",
        epoch=session.clock.samples / parts.plan.epoch_samples,
        loss=report.loss,
        lr=report.lr,
        grad_norm=report.grad_norm,
        global_batch=report.global_batch,
        samples_per_second=session.meter.read(),
        **more,
    )


def _look_around(session: Session) -> None:
    """What other threads have found out meanwhile. RunError where the directory has another owner now."""
    for message in session.parts.runtime.heartbeat.warnings():
        session.log("warning", code="straggler", message=message)
    _log_saves(session)
    if session.lease.lost:
        session.lease.check()


def _guard(session: Session, report: StepReport) -> None:
    parts, clock = session.parts, session.clock
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


# -------------------------------------------------------------------------------------- leaving and coming back


def _save(session: Session, metrics: Metrics | None, *, late: bool = False) -> None:
    since = time.perf_counter()
    parts, clock = session.parts, session.clock
    _name_unreadable(session)
    parts.stats.merge(parts.runtime.sum, parts.runtime.rank)
    if parts.plan.check_every:
        check_ranks(parts, clock, parts.model.state_dict())
    parts.runtime.progress.enter("save")
    model, optimizer = parts.strategy.model_state(), parts.strategy.optimizer_state()
    if parts.runtime.rank:
        return
    state = {
        **asdict(clock),
        "seconds": session.meter.seconds,
        "metrics": metrics,
        "late": late,
        "unreadable": session.unreadable,
        "owner": session.lease.owner,
        "loss_scale": asdict(parts.scale) if parts.scale else None,
        "recipe": parts.config.model_dump(mode="json", by_alias=True),
        "data": parts.loader.dataset.digest,
        "spec": json.loads(json.dumps(asdict(parts.loader.dataset.spec), default=int)),  # some count in NumPy's numbers
    }
    session.trackers.sync()  # what the checkpoint has taken, the metrics have
    preprocess = parts.preprocessing.state if parts.preprocessing else None
    session.checkpoints.save(
        clock.step, model=model, optimizer=optimizer, state=state, preprocess=preprocess, since=since
    )


def _log_saves(session: Session) -> None:
    while session.checkpoints.events:
        session.trackers.log(session.checkpoints.events.popleft())


def _settle(session: Session) -> None:
    """Wait until the last save is on the disk. RunError on every process where it is not."""
    error = session.parts.runtime.agree(session.checkpoints.wait())
    _log_saves(session)
    if error:
        raise error


def _leave(session: Session) -> NoReturn:
    """Make sure of the save and leave a note to go on, for launchers, which do not hand on exit codes."""
    _settle(session)
    run, clock = Path(session.parts.config.run.dir), session.clock
    note = {"signal": session.stop.asked, "step": clock.step, "samples": clock.samples}
    on_rank_0(session.parts, partial(_write_as_owner, session, PREEMPTED, note))
    session.stop.saved = True
    raise Preempted(f"{run}: asked to stop, saved after step {clock.step}; the same command goes on")


def _announce(session: Session, saved: Saved | None, damage: Sequence[str]) -> None:
    for message in damage:
        session.log("warning", code="damaged_checkpoint", message=message)
    if saved:
        session.log("resume", checkpoint=f"{saved.state['step']:08d}")
        return
    for warning in (*session.parts.plan.warnings, *session.parts.warnings):
        session.log("warning", code=warning.code, message=warning.message)


def _finish(session: Session, validation: Metrics | None) -> dict[str, Any]:
    """The summary. The test part is read here, once, at the end of the plan, and nothing is chosen by it."""
    parts, clock = session.parts, session.clock
    summary: dict[str, Any] = {
        "steps": clock.step,
        "samples": clock.samples,
        "seconds": session.meter.seconds,
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
    session.log("eval", split="test", **test)
    _name_unreadable(session)
    if session.unreadable:
        summary["unreadable"] = len(session.unreadable)
    summary["metrics"] = {**test, **{f"validation_{name}": value for name, value in validation.items()}}
    summary["parameters_sha256"] = parameters_sha256(parts)
    # Written last: a run that has a summary is complete.
    on_rank_0(parts, partial(_write_as_owner, session, SUMMARY, summary))
    return summary


def _write_as_owner(session: Session, name: str, content: dict[str, Any]) -> None:
    path = Path(session.parts.config.run.dir) / name
    try:
        session.lease.check()
        _write(path, json.dumps(content, indent=2))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}; the same command goes on") from None


def _write(path: Path, content: str | bytes) -> None:
    """Write a small file that is whole or not there, whenever the process is killed or the disk is full."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def parameters_sha256(parts: Parts) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers, in the order of their names.

    A collective; every process gets rank 0's.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(parts.strategy.model_state().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return str(parts.runtime.agree(digest.hexdigest()))
