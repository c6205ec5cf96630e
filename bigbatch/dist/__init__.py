"""The runtime: processes, devices, collectives."""

from .deepspeed import set_layers
from .fsdp2 import part
from .local import RankError, run_processes
from .runtime import Runtime
from .signals import StopSignal
from .strategy import Strategy

__all__ = ["RankError", "Runtime", "StopSignal", "Strategy", "part", "run_processes", "set_layers"]
