"""Training: assemble the parts, take steps, evaluate, save, go on."""

from .assemble import assemble
from .checkpoint import open_checkpoint, open_newest
from .evaluate import evaluate, unreadable
from .guard import check_ranks, fingerprints
from .loop import train
from .state import Clock, Parts, Preempted, RunError, StepReport
from .step import train_step, upcoming

__all__ = [
    "Clock",
    "Parts",
    "Preempted",
    "RunError",
    "StepReport",
    "assemble",
    "check_ranks",
    "evaluate",
    "fingerprints",
    "open_checkpoint",
    "open_newest",
    "train",
    "train_step",
    "unreadable",
    "upcoming",
]
