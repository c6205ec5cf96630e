"""The plan: every number of a run, decided before a device is touched. Imports no torch."""

from .plan import Decision, Plan, PlanWarning
from .resolve import resolve

__all__ = ["Decision", "Plan", "PlanWarning", "resolve"]
