"""Pure functions of the clock: learning-rate scaling, warmup, decay and batch ramp. Imports no torch."""

from .batch import BatchSchedule
from .rate import LrSchedule
from .scaling import lr_scale

__all__ = ["BatchSchedule", "LrSchedule", "lr_scale"]
