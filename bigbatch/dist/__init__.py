"""The runtime: processes, devices, collectives."""

from .local import RankError, run_processes
from .runtime import Runtime
from .strategy import Strategy

__all__ = ["RankError", "Runtime", "Strategy", "run_processes"]
