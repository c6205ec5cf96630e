"""The runtime: processes, devices, collectives."""

from .deepspeed import set_layers
from .fsdp2 import part
from .heartbeat import repeat
from .local import RankError, run_processes
from .runtime import Runtime, lost_contact
from .strategy import Strategy

__all__ = [
    "RankError",
    "Runtime",
    "Strategy",
    "lost_contact",
    "part",
    "repeat",
    "run_processes",
    "set_layers",
]
