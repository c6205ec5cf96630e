"""The trackers that a recipe asks for."""

from __future__ import annotations

from pathlib import Path

from bigbatch.config import RunConfig

from .base import Event, Tracker, Trackers
from .console import Console
from .jsonl import Jsonl
from .wandb import Wandb


def build_trackers(
    config: RunConfig, *, run_dir: Path, resume_step: int | None, total_steps: int, total_samples: int, rank: int
) -> Trackers:
    """``metrics.jsonl``, the console and, if asked for, Weights & Biases; on a rank other than 0, nobody.

    ``resume_step`` is the step of the checkpoint a run goes on from, None for a run from its beginning. ``debug`` keeps
    off the network: it leaves Weights & Biases out and says so in a warning.
    """
    if rank:
        return Trackers([])
    trackers: list[Tracker] = [
        Jsonl(run_dir / "metrics.jsonl", resume_step=resume_step),
        Console(config.tracking.console, total_samples=total_samples, total_steps=total_steps),
    ]
    warnings: list[Event] = []
    wandb = config.tracking.wandb
    if wandb.mode != "disabled" and config.debug:
        message = f"tracking.wandb.mode = {wandb.mode} is not used while debug is on; set debug: false to track the run"
        warnings.append({"event": "warning", "code": "debug_without_wandb", "message": message})
    elif wandb.mode != "disabled":
        patience = min(30.0, config.parallel.timeout / 3)  # the other processes wait meanwhile
        trackers.append(Wandb(wandb, dir=run_dir, resume_step=resume_step, patience=patience))
    return Trackers(trackers, warnings=warnings)
