"""Training: assemble the parts, take steps, evaluate, save, go on."""

from .assemble import assemble, feed
from .checkpoint import open_newest
from .evaluate import evaluate, unreadable
from .guard import check_ranks, fingerprints
from .loop import train
from .resume import check_classes, preprocess_of_run
from .saved import open_checkpoint
from .state import Clock, Parts, Preempted, RunError, StepReport
from .step import train_step, upcoming

__all__ = [
    "Clock",
    "Parts",
    "Preempted",
    "RunError",
    "StepReport",
    "assemble",
    "check_classes",
    "check_ranks",
    "evaluate",
    "feed",
    "fingerprints",
    "open_checkpoint",
    "open_newest",
    "preprocess_of_run",
    "train",
    "train_step",
    "unreadable",
    "upcoming",
]
