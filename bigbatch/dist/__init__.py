"""The runtime: processes, devices, collectives."""

from .local import RankError, run_processes
from .runtime import Runtime

__all__ = ["RankError", "Runtime", "run_processes"]
