"""Studies of a recipe: they train, compare and report."""

from .replay import Trace, replay
from .verify import Finding, Layout, Verdict, verify

__all__ = ["Finding", "Layout", "Trace", "Verdict", "replay", "verify"]
