"""Documents of text, one after another, and which part each belongs to. Without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from glob import glob
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from bigbatch.config.models import Text

from .base import SPLITS, Split, needs
from .hub import open_split

TABLES = (".jsonl", ".parquet", ".arrow")


def documents(config: Text, split: Split = "train") -> Iterator[str]:
    """Those of one part, without those that are blank.

    A part that is a share has the training documents whose number's hash falls into it, whatever the seed of the run.
    Raises ValueError for what is not there or cannot be read.
    """
    shares = {name: share for name in SPLITS if isinstance(share := getattr(config, name), float)}
    if split != "train" and split not in shares:
        yield from _all(config, split)
        return
    ends = list(accumulate(shares.values(), initial=0.0))
    spans = dict(zip((*shares, "train"), pairwise((*ends, 1.0)), strict=True))
    low, high = spans[split]
    for number, document in enumerate(_all(config, "train")):
        if low <= _place(number) < high:
            yield document


def files(config: Text) -> list[Path]:
    """All that are at hand: none of a dataset on the hub. Raises ValueError for a name that stands for none."""
    if config.hub is not None:
        return sorted(path for path in Path(os.path.expanduser(config.hub)).rglob("*") if path.is_file())
    return [path for split in SPLITS if not isinstance(getattr(config, split), float) for path in _files(config, split)]


def _place(number: int) -> float:
    return int.from_bytes(blake2b(str(number).encode(), digest_size=8).digest(), "big") / 2**64


def _all(config: Text, split: str) -> Iterator[str]:
    if config.hub is not None:
        read: Iterable[str] = _hub(config, split)
    else:
        read = (document for path in _files(config, split) for document in _file(config, path))
    return (document for document in read if document.strip())


def _names(config: Text, split: str) -> tuple[str, ...]:
    source = getattr(config, split)
    return (source,) if isinstance(source, str) else source or (split,)


def _files(config: Text, split: str) -> list[Path]:
    found: list[Path] = []
    for name in _names(config, split):
        paths = sorted(glob(os.path.expanduser(name), recursive=True))
        if not paths:
            raise ValueError(f"data.{split} = {name!r}: no such file; correct it, or give data.size to plan without")
        found += map(Path, paths)
    return found


def _file(config: Text, path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".jsonl":
            yield from _lines_of_json(config, path)
        elif path.suffix in TABLES:
            yield from _column(config, _table(path), str(path))
        elif config.document == "file":
            yield path.read_text(encoding="utf-8")
        else:
            with path.open(encoding="utf-8") as file:
                yield from file if config.document == "line" else _paragraphs(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error}); convert it") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def _table(path: Path) -> Any:
    with needs("text", "datasets"):
        from datasets import Dataset
    try:
        return Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else Dataset.from_file(str(path))
    except Exception as error:  # of many kinds, the last of which says least
        raise ValueError(f"{path}: cannot be read ({error.__cause__ or error}); put a whole file there") from None


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph = ""
    for line in lines:
        if line.strip():
            paragraph += line
        else:
            yield paragraph
            paragraph = ""
    yield paragraph


def _lines_of_json(config: Text, path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[config.field]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}, line {number}: no JSON object with a text under data.field = {config.field!r}; correct "
                    "the line or data.field"
                )
            yield text


def _hub(config: Text, split: str) -> Iterator[str]:
    assert config.hub is not None
    for name in _names(config, split):
        what = f"data.hub = {config.hub!r}: its {name}"
        with needs("text", "datasets"):
            table = open_split(config.hub, name, what=what, name=config.hub_config, revision=config.hub_revision)
        yield from _column(config, table, config.hub)


def _column(config: Text, table: Any, where: str) -> Iterator[str]:
    if config.field not in table.column_names:
        raise ValueError(f"data.field = {config.field!r}: {where} has no such column; it has {table.column_names}")
    for number, row in enumerate(table.select_columns([config.field])):
        text = row[config.field]
        if not isinstance(text, str | None):
            what = f"row {number} of {where} is no text but {text!r:.40}"
            raise ValueError(f"data.field = {config.field!r}: {what}; name another column")
        yield text or ""
