"""What a checkpoint is on the disk, and whether it is whole.

``checkpoints/<step>/`` holds ``model.safetensors``, ``optimizer.pt`` (loads with ``weights_only=True``),
``preprocess.safetensors`` (what images are preprocessed by; without tensors where nothing is), ``state.json`` and
``manifest.json``, the SHA-256 of the four. The manifest is a function of the others, and the directory's name one of
the state, so no byte can change and not be seen.
"""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bigbatch.spec import Spec

from .state import RunError

State = dict[str, Any]
MODEL, OPTIMIZER, PREPROCESS = "model.safetensors", "optimizer.pt", "preprocess.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, PREPROCESS, STATE, MANIFEST)
DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}
"""Errors of a file that is not what was saved. Any other may be gone the next time."""


class Damaged(RunError):
    """A checkpoint is not what was saved; an older one may be."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint directory that was found whole. ``sums`` are the SHA-256 of its files.

    What is loaded is held against them once more, since it may be on another machine. RunError where it differs or
    cannot be read.
    """

    path: Path
    state: State
    sums: dict[str, str]

    def model(self) -> State:
        return self._load(MODEL, load_file)

    def optimizer(self) -> State:
        """Tensors and plain values only: a file that would run code is not loaded, whatever its checksum."""
        return self._load(OPTIMIZER, lambda path: torch.load(path, weights_only=True, map_location="cpu"))

    def preprocess(self) -> State:
        """What `bigbatch.data.Preprocessing` is made of; nothing where nothing is preprocessed."""
        return self._load(PREPROCESS, load_file)

    def spec(self) -> Spec:
        """What the data was that the model has learnt from."""
        if "spec" not in self.state:
            raise RunError(f"checkpoint {self.path}: is of an earlier version, which did not save what its data was")
        spec = self.state["spec"]
        return Spec(tuple(spec["shape"]), spec["classes"], tuple(spec["names"]), spec["special"])

    def _load(self, name: str, load: Callable[[Path], State]) -> State:
        with _reading(self.path):
            if sha256(self.path / name) != self.sums[name]:
                raise Damaged(f"checkpoint {self.path} is damaged: {name} is not what it was when it was verified")
            return load(self.path / name)


def open_checkpoint(path: Path) -> Saved:
    """Verify all of it. RunError names the directory and what is damaged, missing or not part of a checkpoint; it is
    `Damaged` unless the cause may pass."""
    with _reading(path):
        plain = {entry.name: stat.S_ISREG(entry.lstat().st_mode) for entry in path.iterdir()}
        found = {name if is_plain else f"{name} (no plain file)" for name, is_plain in plain.items()}
        if wrong := sorted(found ^ {*FILES}):
            raise Damaged(f"checkpoint {path} is damaged: missing or out of place: {', '.join(wrong)}")
        sums, manifest = sums_of(path), (path / MANIFEST).read_bytes()
        if manifest != manifest_of(sums):
            recorded = json.loads(manifest)
            changed = [name for name in sums if recorded[name] != sums[name]] or [MANIFEST]
            raise Damaged(f"checkpoint {path} is damaged: {' and '.join(changed)} does not match its checksum")
        state = json.loads((path / STATE).read_text())
        if path.name not in (name := name_of(state["step"]), f".{name}.replaced"):
            raise Damaged(f"checkpoint {path} is damaged: it holds step {state['step']}; was it renamed?")
        return Saved(path, state, sums)


def peek(path: Path) -> Saved:
    """A checkpoint of which nothing but the state is verified yet. RunError as `open_checkpoint`."""
    with _reading(path):
        saved = Saved(path, {}, json.loads((path / MANIFEST).read_text()))
        return replace(saved, state=saved._load(STATE, lambda file: json.loads(file.read_text())))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a checkpoint cannot be read for becomes a RunError that names it."""
    try:
        yield
    except RunError:
        raise
    except pickle.UnpicklingError:
        what = f"{OPTIMIZER} holds something else than tensors and plain values"
        raise Damaged(f"checkpoint {path}: {what} and was not loaded, since that could run code") from None
    except Exception as error:  # a damaged file breaks its reader in any way
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in DAMAGE):
            raise RunError(f"checkpoint {path} cannot be read now: {error!r}; run again") from None
        raise Damaged(f"checkpoint {path} is damaged: {error!r}") from None


def step_of(path: Path) -> int:
    """The step of a checkpoint, by the name that `Checkpoints.paths` gives."""
    return int(path.name.removeprefix(".").removesuffix(".replaced"))


def name_of(step: int) -> str:
    return f"{step:08d}"


def sums_of(path: Path) -> dict[str, str]:
    return {name: sha256(path / name) for name in FILES[:-1]}


def manifest_of(sums: dict[str, str]) -> bytes:
    return json.dumps(sums, indent=2).encode()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
