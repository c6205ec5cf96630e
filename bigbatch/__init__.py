"""bigbatch: large-batch training for PyTorch without guessing. Names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clip import clip_gradients
    from .config import ConfigError, Duration, RunConfig, load_config
    from .norm import SpanBatchNorm, convert_norm
    from .optim import LAMB, LARS, build_optimizer, parameter_groups
    from .plan import Plan, resolve
    from .train import assemble, train_step

__version__ = "0.1.0"

_ROOMS = {
    "clip": ("clip_gradients",),
    "config": ("ConfigError", "Duration", "RunConfig", "load_config"),
    "norm": ("SpanBatchNorm", "convert_norm"),
    "optim": ("LAMB", "LARS", "build_optimizer", "parameter_groups"),
    "plan": ("Plan", "resolve"),
    "train": ("assemble", "train_step"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "LAMB", "LARS", "ConfigError", "Duration", "Plan", "RunConfig", "SpanBatchNorm", "assemble", "build_optimizer",
    "clip_gradients", "convert_norm", "load_config", "parameter_groups", "resolve", "train_step",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
