"""How many training samples a recipe has, found without torch and without reading an image."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Literal

from bigbatch.config.models import CustomData, Data, Digits, Folder, Hub, Idx, Shards, Synthetic, Text

DIGITS_TRAIN = 1085  # of 1,797; the rest validates (357) and tests (355)
DOWNLOADED_TRAIN = 60_000  # of MNIST and of Fashion-MNIST alike, before data.validation is taken off

TRAIN_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST_FILES = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
TORCHVISION = {"fashion_mnist": "FashionMNIST", "mnist": "MNIST"}


def size_of(config: Data) -> int:
    """Training samples of ``config``: counted where the data is at hand or known, else ``data.size``.

    Raises ValueError if ``data.size`` contradicts the data, if there is neither, or if an idx file is damaged.
    """
    match config:
        case Synthetic():
            return config.size
        case Digits():
            return _agreed(config, DIGITS_TRAIN)
        case Idx():
            known = _idx_size(config)
            if known is not None:
                return _agreed(config, known)
            if config.size is not None:
                return config.size
            raise not_found(config)
        case Folder() | Shards() | Hub():
            from .listing import files_size

            return _agreed(config, files_size(config))
        case Text():
            from .corpus import text_size

            return _agreed(config, text_size(config))
        case CustomData():
            if config.size is not None:
                return config.size
            from .custom import load_custom

            return len(load_custom(config, seed=0).train)


def _agreed(config: Data, known: int) -> int:
    if config.size not in (None, known):
        raise ValueError(
            f"data.size = {config.size}: the data has {known} training samples; write data.size={known} or leave it out"
        )
    return known


def _idx_size(config: Idx) -> int | None:
    folder = find_folder(config)
    if folder is not None:
        (total,) = read_header(find_file(folder, TRAIN_FILES[1]), dimensions=1)
    elif config.download is not None:
        total = DOWNLOADED_TRAIN
    else:
        return None
    if config.validation >= total:
        raise ValueError(f"data.validation = {config.validation}: leaves none of {total} images to train on; lower it")
    return total - config.validation


def folders(config: Idx) -> list[Path]:
    """Every place the four files may lie in, in the order in which they are tried."""
    paths = (config.path,) if isinstance(config.path, str) else config.path
    named = [Path(os.path.expanduser(path)) for path in paths]
    if config.download is None:
        return named
    return [place for path in named for place in (path, path / TORCHVISION[config.download] / "raw")]


def find_folder(config: Idx) -> Path | None:
    """The first folder that has all four files, plain or gzipped; a path that cannot be one has none."""
    return next((folder for folder in folders(config) if not _missing(folder)), None)


def find_file(folder: Path, name: str) -> Path:
    """The plain file if there is one, else the gzipped one (which may be missing)."""
    plain = folder / name
    return plain if os.path.isfile(plain) else folder / f"{name}.gz"


def not_found(config: Idx) -> ValueError:
    tried = "; ".join(f"{folder} (lacks {', '.join(_missing(folder))})" for folder in folders(config))
    return ValueError(
        f"data.path = {config.path!r}: no folder has the four idx files; tried {tried}. "
        "`apt-get install dataset-fashion-mnist` puts them in /usr/share/datasets/fashion-mnist, "
        "data.download=fashion_mnist (or mnist) fetches them, and data.size=N lets a plan be made without them"
    )


def _missing(folder: Path) -> list[str]:
    return [name for name in (*TRAIN_FILES, *TEST_FILES) if not os.path.isfile(find_file(folder, name))]


def read_header(path: Path, *, dimensions: int) -> tuple[int, ...]:
    """The extents in the header of an idx file of unsigned bytes; of a gzipped one, only the first block is read."""
    return _parse(path, dimensions=dimensions, data="header")[0]


def read_idx(path: Path, *, dimensions: int) -> tuple[tuple[int, ...], bytes]:
    """Extents and values of an idx file of unsigned bytes."""
    shape, values = _parse(path, dimensions=dimensions, data="all")
    size = math.prod(shape)
    expect(len(values) == size, path, f"{len(values)} values", f"{size} for the extents {shape}")
    return shape, values


def _parse(path: Path, *, dimensions: int, data: Literal["header", "all"]) -> tuple[tuple[int, ...], bytes]:
    length = 4 * (1 + dimensions)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(length)
            values = file.read() if data == "all" else b""
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); get the file again") from None
    magic = bytes((0, 0, 0x08, dimensions))  # two zeros, the code of unsigned bytes, the number of extents that follow
    expect(header[:4] == magic, path, f"magic {header[:4].hex() or 'nothing'}", f"{magic.hex()} (idx, unsigned bytes)")
    expect(len(header) == length, path, f"a header of {len(header)} bytes", f"{length}")
    return tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, length, 4)), values


def expect(ok: bool, path: Path, found: str, expected: str) -> None:
    """Raises ValueError about a file that is not what it should be."""
    if not ok:
        raise ValueError(f"{path}: found {found}, expected {expected}; is it the right file, and whole?")
