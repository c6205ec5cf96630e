"""Run a test's function on several real processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bigbatch.dist import run_processes

LIMIT = 60.0


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`run_processes` for a test, which may take a minute."""
    return run_processes(world, function, *args, timeout=LIMIT, limit=LIMIT)
