"""Finished runs side by side, from the files in their directories: ``python launch/compare.py RUN_DIR ...``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

COLUMNS = ("run", "global batch", "optimiser", "processes", "steps", "epochs", "seconds", "test accuracy")


def row(run: Path) -> tuple[str, ...]:
    """One run's line of the table. Raises ValueError naming the file that is missing or not a finished run's."""
    config = yaml.safe_load(_read(run / "config.yaml"))
    plan, summary = json.loads(_read(run / "plan.json")), json.loads(_read(run / "summary.json"))
    return (
        run.name,
        f"{plan['global_batch']:,}",
        config["optim"]["name"],
        str(summary["world_size"]),
        f"{summary['steps']:,}",
        f"{plan['epochs']:.4g}",
        f"{summary['seconds']:.1f}",
        f"{summary['metrics']['accuracy']:.2%}",
    )


def main(arguments: list[str]) -> int:
    if not arguments:
        print("usage: compare.py RUN_DIR ...", file=sys.stderr)
        return 2
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number in (0, 2) else "right")
    try:
        for run in arguments:
            table.add_row(*row(Path(run)))
    except ValueError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console.width = 120  # where there is no terminal, nobody needs lines cut at its width
    console.print(table)
    return 0


def _read(path: Path) -> Any:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{path}: {reason}; give the directory (run.dir) of a run that has ended") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
