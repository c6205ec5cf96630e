"""``bigbatch shard``: class folders become shuffled tar shards, as WebDataset and ``data.name: shards`` read them."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from bigbatch.cli import FAILED, OK, _positive, _say
from bigbatch.config import ConfigError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_to(verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = verb("shard", run, "Write class folders of images as shuffled tar shards with an index.", recipe=False)
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of the splits, each with its class folders")
    parser.add_argument("dest", metavar="DEST", type=Path, help="new folder; in a begun one, the same command goes on")
    parser.add_argument("--size", type=_bytes, default="256MB", help="of a shard, about (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of images (%(default)s)")
    parser.add_argument(
        "--splits", nargs="+", help="folders in SRC, training first (those of train, val, test there are)"
    )
    parser.add_argument("--resize", type=_positive, help="make larger JPEGs smaller, their shorter side so many pixels")
    parser.add_argument(
        "--workers", type=_positive, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """The verb. Exit codes: 0; 1 where files cannot be read or written; 2 for a SRC or DEST that will not do."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from bigbatch.data.write import write_shards

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("images")
        options = {name: value for name, value in vars(args).items() if name != "verb"}
        try:
            index = write_shards(**options, progress=lambda done, total: bar.update(task, advance=done, total=total))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        except (OSError, BrokenProcessPool) as error:
            return _say(f"{args.dest}: {error}; the same command goes on", FAILED)
    shards = index["shards"]
    size = sum(shard["bytes"] for shard in shards) / 1e6
    images = " and ".join(f"{count:,} of {split}" for split, count in index["splits"].items())
    print(f"{args.dest}: {images} in {len(shards)} shards of up to {shards[0]['samples']:,} images, {size:,.1f} MB")
    return OK


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([1-9]\d*)(KB|MB|GB)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is no size such as 256MB; write KB, MB or GB")
    return int(match[1]) * UNITS[match[2]]
