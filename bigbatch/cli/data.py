"""``bigbatch data``: what a recipe will feed to its model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bigbatch.cli import FAILED, OK, _positive, _say, make_plan
from bigbatch.config import ConfigError, RunConfig, load_config

if TYPE_CHECKING:
    from bigbatch.analysis.survey import Survey
    from bigbatch.data import Loader

SAMPLES, NAMED, ROWS = 4096, 5, 4
SHEET = "contact_sheet.png"


def add_to(verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = verb("data", run, "Show what a recipe will feed: counts, statistics, duplicates, speed, a picture.")
    parser.add_argument("--samples", type=_positive, default=SAMPLES, help="samples of each part to read (%(default)s)")
    parser.add_argument("--scan", action="store_true", help="read them all")
    parser.add_argument("--out", type=Path, help=f"folder for {SHEET} (default: run.dir)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """The verb. Exit codes: 0; 1 where nothing can be read."""
    here = ("parallel.expect_world_size=null", "debug=false")
    config = load_config(args.config, [*args.overrides, *here])
    if hasattr(config.data, "unreadable"):  # all of them are to be named
        data = config.data.model_copy(update={"unreadable": "skip"})
        config = config.model_copy(update={"data": data})
    plan = make_plan(config, world_size=1)

    from bigbatch.analysis.survey import survey
    from bigbatch.data import DataError
    from bigbatch.dist import Runtime
    from bigbatch.train import feed

    runtime = Runtime(precision=config.precision)
    try:
        loader, preprocessing, _ = feed(config, plan, runtime)
    except DataError as error:
        return _say(str(error), FAILED)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    samples: int | Literal["all"] = "all" if args.scan else args.samples
    try:
        found = survey(loader, preprocessing, samples=samples, seed=config.seed, micro=plan.micro_batch)
        sheet = _sheet(loader, args.out or Path(config.run.dir))
        rows = _rows(loader)
    except DataError as error:
        return _say(str(error), FAILED)
    finally:
        loader.close()
    if args.json:
        told = {**asdict(found), "workers": config.data.workers, "contact_sheet": sheet, "rows": rows}
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        _show(config, found, sheet, rows)
    return OK


def _rows(loader: Loader) -> list[tuple[str, str]]:
    if loader.dataset.kind != "text":
        return []
    from bigbatch.analysis.sheet import rows_of_text

    return rows_of_text(loader, ROWS)


def _sheet(loader: Loader, folder: Path) -> str | None:
    """The path of the picture, or None for data that has none."""
    if loader.dataset.kind != "image":
        return None
    from bigbatch.analysis.sheet import contact_sheet

    try:
        folder.mkdir(parents=True, exist_ok=True)
        contact_sheet(loader, folder / SHEET)
    except ImportError:
        print(f"bigbatch: no {SHEET}: matplotlib is missing; pip install 'bigbatch[plot]'", file=sys.stderr)
        return None
    except OSError as error:
        raise ConfigError(f"--out = {folder}: cannot be written to ({error}); give another folder") from None
    return str(folder / SHEET)


def _show(config: RunConfig, found: Survey, sheet: str | None, rows: list[tuple[str, str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table("", *found.samples, box=SIMPLE_HEAD, pad_edge=False)
    table.add_row("samples", *(f"{size:,}" for size in found.samples.values()))
    table.add_row("read", *(f"{size:,}" for size in found.read.values()))
    names = dict.fromkeys(name for classes in found.classes.values() for name in classes)
    for name in names:
        table.add_row(name, *(f"{found.classes.get(split, {}).get(name, 0):,}" for split in found.samples))
    console.print(table)
    lines = [f"{name}: {what}" for name, what in found.columns.items()]
    lines += [f"{name}: {', '.join(f'{value:.4g}' for value in values)}" for name, values in found.statistics.items()]
    for name, numbers in found.inputs.items():
        told = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        lines.append(f"{name} as the model gets it: {told}")
    lines += [f"unreadable: {name}: {why}" for name, why in list(found.unreadable.items())[:NAMED]]
    if len(found.unreadable) > NAMED:
        lines.append(f"unreadable: {len(found.unreadable) - NAMED} more")
    for where, pairs in found.duplicates.items():
        lines.append(f"the same in {where}: {len(pairs)}, such as samples {pairs[0][0]} and {pairs[0][1]}")
    lines += ["nothing of what was read is there twice"] * (not found.duplicates)
    lines.append(f"read for training: {found.samples_per_second:,.0f} samples/s, data.workers={config.data.workers}")
    lines += [f"picture: {sheet}"] * bool(sheet)
    console.print("\n".join(lines), highlight=False, markup=False)
    if rows:
        table = Table("a row of text", "as the model gets it", box=SIMPLE_HEAD, pad_edge=False, show_lines=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
