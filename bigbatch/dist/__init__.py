"""The runtime: processes, devices, collectives."""

from .runtime import Runtime

__all__ = ["Runtime"]
