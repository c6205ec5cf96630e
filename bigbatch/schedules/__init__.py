"""Pure functions of the clock: learning-rate scaling, warmup and decay. Imports no torch."""

from .rate import LrSchedule
from .scaling import lr_scale

__all__ = ["LrSchedule", "lr_scale"]
