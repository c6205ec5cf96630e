from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from bigbatch.data.write import write_shards
from pictures import write_folder


def idx_bytes(array, *, magic=None):
    array = np.asarray(array, dtype=np.uint8)
    return struct.pack(f">I{array.ndim}I", magic or 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def plant(tmp_path):
    """Writes a small, right set of idx files; named files may be replaced by other bytes, or left out with None."""

    def write(folder="idx", *, train=20, test=8, size=(6, 5), packed=True, seed=0, **replaced):
        rng = np.random.default_rng(seed)
        content = {}
        for key, name, n in (("train", "train", train), ("test", "t10k", test)):
            content[f"{key}_images"] = (f"{name}-images-idx3-ubyte", idx_bytes(rng.integers(0, 256, (n, *size))))
            content[f"{key}_labels"] = (f"{name}-labels-idx1-ubyte", idx_bytes(np.arange(n) % 4))
        where = tmp_path / folder
        where.mkdir(parents=True, exist_ok=True)
        for key, (name, data) in content.items():
            data = replaced.get(key, data)
            if data is not None:
                (where / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
        return where

    return write


@pytest.fixture
def encode():
    return idx_bytes


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Class folders: 20 images to train, 12 to validate."""
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="session")
def dest(folder, tmp_path_factory):
    """Them as shards of four images."""
    made = tmp_path_factory.mktemp("dest")
    index = write_shards(folder, made, size=14_000, seed=3, progress=lambda done, total: None)
    assert [shard["samples"] for shard in index["shards"]] == [4] * 8
    return made
