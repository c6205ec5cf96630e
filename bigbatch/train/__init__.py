"""Training: assemble the parts, take steps, evaluate, save, go on."""

from .assemble import assemble
from .checkpoint import open_checkpoint, open_newest
from .evaluate import evaluate
from .loop import train
from .state import Parts, RunError, StepReport
from .step import train_step

__all__ = [
    "Parts",
    "RunError",
    "StepReport",
    "assemble",
    "evaluate",
    "open_checkpoint",
    "open_newest",
    "train",
    "train_step",
]
