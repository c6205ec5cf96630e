"""Checkpoints: directories that are whole or not there, with a checksum for every file.

``checkpoints/<step>/`` holds ``model.safetensors``, ``optimizer.pt`` (loads with ``weights_only=True``), ``state.json``
and ``manifest.json``. Which is newest and which is best is read from the directories, never from a pointer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from .state import RunError

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.pt", "state.json", "manifest.json"


@dataclass(frozen=True)
class Saved:
    """A checkpoint directory that was found whole."""

    path: Path
    state: dict[str, Any]

    def model(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / MODEL)

    def optimizer(self) -> dict[str, Any]:
        return torch.load(self.path / OPTIMIZER, weights_only=True, map_location="cpu")  # type: ignore[no-any-return]


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, root: Path, *, keep: int, best: str, best_is: Literal["max", "min"]) -> None:
        self.root = root
        self._keep, self._best, self._best_is = keep, best, best_is

    def save(
        self, step: int, *, model: dict[str, torch.Tensor], optimizer: dict[str, Any], state: dict[str, Any]
    ) -> Path:
        """Write to a hidden directory, flush every file to the disk, rename; then delete what need not be kept."""
        target = self.root / f"{step:08d}"
        part = self.root / f".{target.name}.part"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            save_file(_apart(model), part / MODEL)
            torch.save(optimizer, part / OPTIMIZER)
            (part / STATE).write_text(json.dumps(state, indent=2))
            sums = {name: _sha256(part / name) for name in (MODEL, OPTIMIZER, STATE)}
            (part / MANIFEST).write_text(json.dumps(sums, indent=2))
            for name in (*sums, MANIFEST):
                _flush(part / name)
            _flush(part)
            if target.exists():
                shutil.rmtree(target)
            part.rename(target)
            _flush(self.root)
            self._prune()
        except OSError as error:
            raise RunError(
                f"checkpoint {target} cannot be written: {error}; older checkpoints are untouched"
            ) from error
        return target

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest whole checkpoint, and what is wrong with each newer one.

        None only where there is no checkpoint at all; RunError where there are some and none is whole.
        """
        damage: list[str] = []
        for path in reversed(self._paths()):
            try:
                return open_checkpoint(path), damage
            except RunError as error:
                damage.append(str(error))
        if damage:
            raise RunError(
                "no whole checkpoint is left: "
                + "; ".join(damage)
                + "; restore one, or start afresh in another run.dir"
            )
        return None, []

    def set_aside(self, newest: Saved) -> None:
        """Rename the damaged directories after the newest whole one, so that their steps can be saved again."""
        for path in self._paths():
            if int(path.name) > int(newest.path.name):
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

    def _paths(self) -> list[Path]:
        found = (path for path in self.root.glob("[0-9]*") if path.is_dir() and path.name.isdigit())
        return sorted(found, key=lambda path: int(path.name))

    def _prune(self) -> None:
        paths = self._paths()
        scores = [(score, path) for path in paths if (score := _score(path, self._best)) is not None]
        sign = 1 if self._best_is == "max" else -1
        kept = {max(scores, key=lambda pair: sign * pair[0])[1]} if scores else set()
        for path in paths[: -self._keep]:
            if path not in kept:
                shutil.rmtree(path)


def open_checkpoint(path: Path) -> Saved:
    """Verify every checksum. RunError names the directory and the file that is damaged or missing."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
        for name in (MODEL, OPTIMIZER, STATE):
            if _sha256(path / name) != sums[name]:
                raise RunError(f"checkpoint {path} is damaged: {name} does not match its checksum")
        return Saved(path, json.loads((path / STATE).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{Path(error.filename).name} is missing" if isinstance(error, FileNotFoundError) else f"{error!r}"
        raise RunError(f"checkpoint {path} is damaged: {what}") from None


def open_newest(root: Path) -> Saved:
    """The newest whole checkpoint under ``root``; damaged ones after it are named on standard error."""
    saved, damage = Checkpoints(root, keep=1, best="", best_is="max").newest()
    for message in damage:
        print(f"bigbatch: {message}", file=sys.stderr)
    if saved is None:
        raise RunError(f"{root}: no checkpoint yet; train first")
    return saved


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as safetensors takes them: in their plain order, which convolution weights may not have, and a tied
    weight in memory of its own for each of its names."""
    apart: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart


def _score(path: Path, metric: str) -> float | None:
    try:
        value = json.loads((path / STATE).read_text())["metrics"][metric]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, float) and value == value else None


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
