"""The recipe: models, durations, and reading them from YAML. Imports no torch."""

from .duration import Duration
from .load import ConfigError, dump_config, load_config, merge
from .models import RunConfig
from .redact import redact, say

__all__ = ["ConfigError", "Duration", "RunConfig", "dump_config", "load_config", "merge", "redact", "say"]
