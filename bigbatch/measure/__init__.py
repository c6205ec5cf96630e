"""Read-only probes: they look at a run and change nothing."""

from .throughput import Throughput

__all__ = ["Throughput"]
