"""What happened in a run, told to a file, a terminal and Weights & Biases."""

from .base import Event, Status, Tracker, Trackers
from .build import build_trackers
from .console import Console
from .jsonl import Jsonl, read_events
from .wandb import Wandb

__all__ = [
    "Console",
    "Event",
    "Jsonl",
    "Status",
    "Tracker",
    "Trackers",
    "Wandb",
    "build_trackers",
    "read_events",
]
