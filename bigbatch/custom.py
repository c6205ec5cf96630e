"""Code of the user's own that a recipe names: loaded only where the user said so, and told by name where it fails."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from bigbatch.config import ConfigError, RunConfig
from bigbatch.config.models import CustomData, CustomTask

ALLOW = "BIGBATCH_ALLOW_CUSTOM"
"""Environment variable that processes hand on to those they start; 1 is what ``--allow-custom`` sets."""


def allowed() -> bool:
    """Whether the user allows a recipe to run code of its own."""
    return os.environ.get(ALLOW) == "1"


def check_allowed(config: RunConfig) -> None:
    """ConfigError where a recipe names code of its own and the user has not allowed that."""
    for key, section in (("data", config.data), ("task", config.task)):
        if isinstance(section, CustomData | CustomTask):
            _check_allowed(f"{key}.target", section.target)


def _check_allowed(key: str, target: str) -> None:
    if not allowed():
        raise ConfigError(
            f"{key} = {target!r}: the recipe would run code that is not bigbatch's; read that module, and if you trust "
            f"it add --allow-custom (or set {ALLOW}=1)"
        )


def load_target(target: str, *, key: str) -> Callable[..., Any]:
    """What ``module:Name`` names, the current directory first. ValueError where that is not allowed or fails."""
    _check_allowed(key, target)
    if not {"", os.getcwd()} & {*sys.path}:  # an installed script does not look there
        sys.path.insert(0, os.getcwd())
    module, _, name = target.partition(":")
    with told(key, target, f"importing {module}"):
        found = getattr(import_module(module), name)
    if not callable(found):
        raise ValueError(f"{key} = {target!r}: is {found!r}; name a function or a class")
    return found  # type: ignore[no-any-return]


@contextmanager
def told(
    key: str, target: str, what: str, *, error: type[ValueError] = ValueError, passing: type[Exception] | tuple[()] = ()
) -> Iterator[None]:
    """An exception inside, but for one of the kind ``passing``, becomes an ``error`` that says whose code failed, at
    what, and on which of its lines."""
    try:
        yield
    except passing:
        raise
    except Exception as cause:
        file = getattr(sys.modules.get(target.partition(":")[0]), "__file__", None)
        lines = [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if frame.filename == file]
        where = f", line {lines[-1]} of {file}" if lines else ""
        raise error(f"{key} = {target!r}: {what} failed: {type(cause).__name__}: {cause}{where}") from cause
