"""LARS, LAMB, parameter groups, and every optimiser a recipe can name."""

from .factory import build_optimizer
from .groups import parameter_groups
from .lamb import LAMB
from .lars import LARS

__all__ = ["LAMB", "LARS", "build_optimizer", "parameter_groups"]
