"""Text, tokenised once and kept as rows of tokens; without torch, so that a plan can count them.

``data.cache`` has a folder for each text and way to cut it, ``text/KEY``, which is whole or not there: ``train.bin``,
``validation.bin`` and ``test.bin``, rows of token ids (N, L), row by row, in the smallest of uint16 and uint32 that
holds the vocabulary; ``tokenizer.json``; and ``meta.json``, which tells the rest. KEY is a hash of the settings and of
names, sizes and times of the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from bigbatch.config.models import Text

from .base import SPLITS, needs
from .cache import locked
from .documents import documents, files
from .tokenizer import NAMES, make_tokenizer, special_tokens, tokenizer_file

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    Rows = np.ndarray[tuple[int, int], np.dtype[np.unsignedinteger]]

FORMAT = 1
AT_A_TIME = 1024
"""Documents that are tokenised together."""


@dataclass(frozen=True)
class Corpus:
    """What was kept of a text.

    rows: of each part. vocabulary: ids are below it. special: ids by role. digest: of the tokenizer and all rows.
    """

    folder: Path
    length: int
    dtype: str
    rows: dict[str, int]
    vocabulary: int
    special: dict[str, int]
    digest: str

    @property
    def tokenizer(self) -> str:
        return (self.folder / "tokenizer.json").read_text(encoding="utf-8")

    def file(self, split: str) -> Path:
        return self.folder / f"{split}.bin"


def text_size(config: Text) -> int:
    """Rows of the training part; those of ``data.size`` as long as the text has not been tokenised here."""
    if config.size is None:
        return corpus(config).rows["train"]
    with suppress(ValueError):  # where the text is not at hand
        if kept := _kept(_folder(config)):
            return kept.rows["train"]
    return config.size


def corpus(config: Text) -> Corpus:
    """The text of ``config``, tokenised now if it was not before, or if what was kept is not whole.

    Processes of a machine wait for the one that does it. Raises ValueError for text that is not there, cannot be read,
    or does not fill a row, for a tokenizer that does not fit, and for a cache that cannot be written.
    """
    folder = _folder(config)
    if kept := _kept(folder):
        return kept
    try:
        with ExitStack() as held:
            with suppress(OSError):  # a file system without locks: then several may build, and the first to end counts
                held.enter_context(locked(folder.with_suffix(".lock")))
            return _kept(folder) or _build(config, folder)
    except OSError as error:
        raise ValueError(f"data.cache = {config.cache!r}: {error}; give a folder that can be written") from None


def _folder(config: Text) -> Path:
    settings = config.model_dump(
        mode="json",
        include={
            "train", "validation", "test", "hub", "hub_config", "hub_revision", "field", "document", "tokenizer",
            "length", "packing",
        },
    )  # fmt: skip
    with needs("text", "tokenizers"):
        tool = version("tokenizers")
    paths = [*files(config), *([tokenizer_file(config.tokenizer.path)] if config.tokenizer.path is not None else [])]
    try:
        known = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
    except OSError as error:
        raise ValueError(f"data: {error}; correct its name") from None
    key = json.dumps([FORMAT, tool, settings, known], sort_keys=True)
    return Path(os.path.expanduser(config.cache), "text", hashlib.sha256(key.encode()).hexdigest()[:32])


def _kept(folder: Path) -> Corpus | None:
    """What lies in the folder, if it is whole: of the rows, their number is looked at."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        found = Corpus(folder, **meta)
        width = {"uint16": 2, "uint32": 4}[found.dtype] * found.length
        sizes = [found.file(split).stat().st_size == found.rows[split] * width for split in SPLITS]
        json.loads(found.tokenizer)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if all(sizes) else None


def _build(config: Text, folder: Path) -> Corpus:
    part = folder.with_name(f".{folder.name}.{uuid4().hex}")
    part.mkdir(parents=True)
    try:
        tokenizer = make_tokenizer(config.tokenizer, partial(documents, config))
        text = tokenizer.to_str()
        (part / "tokenizer.json").write_text(text, encoding="utf-8")
        special, vocabulary = special_tokens(tokenizer), max(tokenizer.get_vocab().values()) + 1
        for role in ("cls", "sep") if config.packing else ("cls", "sep", "pad"):
            if role not in special:
                raise ValueError(
                    f"data.tokenizer.path = {config.tokenizer.path!r}: has none of {', '.join(NAMES[role])}, of which "
                    "rows are made; add one"
                )
        meta: dict[str, Any] = {
            "length": config.length,
            "dtype": "uint16" if vocabulary <= 2**16 else "uint32",
            "rows": {},
            "vocabulary": vocabulary,
            "special": special,
        }
        digest = hashlib.sha256(text.encode())
        for split in SPLITS:
            count = 0
            with (part / f"{split}.bin").open("wb") as file:
                for rows in _rows(config, tokenizer, special, documents(config, split)):
                    data = rows.astype(meta["dtype"]).tobytes()
                    file.write(data)
                    digest.update(data)
                    count += len(rows)
            if not count:
                raise ValueError(
                    f"data.{split} = {getattr(config, split)!r}: does not fill one row of {config.length} tokens; give "
                    "more text, or lower data.length"
                )
            meta["rows"][split] = count
        meta["digest"] = digest.hexdigest()
        (part / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
        try:
            part.rename(folder)
        except OSError:  # something is there
            if kept := _kept(folder):
                return kept
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Corpus(folder, **meta)


def _rows(config: Text, tokenizer: Tokenizer, ids: dict[str, int], documents: Iterator[str]) -> Iterator[Rows]:
    """Blocks (n, L) of rows, which begin with [CLS].

    With ``packing`` the tokens of all documents, with [SEP] after each, are cut into pieces of L - 1 wherever that
    falls, and what is left in the end is dropped. Without, a row is one document, cut after L - 2 tokens, [SEP], and as
    many [PAD] as it takes.
    """
    import numpy as np

    length, left = config.length, list[int]()
    while some := list(islice(documents, AT_A_TIME)):
        encoded = [each.ids for each in tokenizer.encode_batch_fast(some, add_special_tokens=False)]
        if config.packing:
            left.extend(chain.from_iterable((*each, ids["sep"]) for each in encoded))
            end = len(left) - len(left) % (length - 1)
            rows = np.array(left[:end], np.uint32).reshape(-1, length - 1)
            left = left[end:]
            yield np.insert(rows, 0, ids["cls"], axis=1)
        else:
            rows = np.full((len(encoded), length), ids["pad"], np.uint32)
            for row, each in zip(rows, encoded, strict=True):
                text = [ids["cls"], *each[: length - 2], ids["sep"]]
                row[: len(text)] = text
            yield rows
