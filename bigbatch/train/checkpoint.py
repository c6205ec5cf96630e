"""When checkpoints are written, which are kept, and which is the newest; what one is, `saved` knows.

``checkpoints/<step>/`` is whole or not there. What is being written or deleted has a name that begins with a dot;
``.<step>.replaced`` stands in for a step that was to be saved again, until it was.
Which is newest and which is best is read from the directories, never from a pointer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from .saved import (
    FILES,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    PREPROCESS,
    STATE,
    Damaged,
    Saved,
    State,
    manifest_of,
    name_of,
    open_checkpoint,
    sha256,
    step_of,
    sums_of,
)
from .state import RunError

HIDDEN = re.compile(r"\.(\d+)\.(?:(\d+)\.)?(?:\d+\.)?(part|old|replaced)")
"""Names of what is written or deleted: step, owner of a part, a number that makes it unique, kind."""


class Checkpoints:
    """The checkpoints of one run directory.

    ``write`` background: a save copies all tensors to host memory, which is kept for the next one, and a thread writes
    while training goes on. foreground: the caller waits, and nothing is copied. One save is in flight at a time.
    ``check`` is called before a checkpoint takes its name, and may raise RunError. ``events`` are the saves that have
    ended, to be logged and taken away: ``checkpoint``, with the seconds that training waited and that writing took, or
    a ``warning``.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        best: str,
        best_is: Literal["max", "min"],
        write: Literal["background", "foreground"] = "foreground",
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.root, self.events = root, deque[State]()
        self._keep, self._best, self._best_is = keep, best, best_is
        self._background, self._check = write == "background", check
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flight: Future[None] | None = None
        self._host: Any = None

    def save(
        self,
        step: int,
        *,
        model: State,
        optimizer: State,
        state: State,
        preprocess: State | None = None,
        since: float | None = None,
    ) -> Path:
        """Begin a save, once the one before has ended; `wait` and ``events`` tell how it went.

        ``state`` must go into JSON; its ``owner``, 0 where there is none, is for `newest`. ``preprocess`` are tensors
        that no step changes. Training has waited since ``since`` on time.perf_counter, or from now on.
        """
        since = time.perf_counter() if since is None else since
        self.wait()
        state = {"owner": 0, "samples": 0, **state, "step": step}
        target = self.root / name_of(step)
        if self._background:
            try:
                model, optimizer, state = self._host = on_host((model, optimizer, state), self._host)
                if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                    torch.cuda.synchronize()
            except (OSError, RuntimeError, MemoryError) as error:
                self._host, self._flight = None, Future()
                self._flight.set_exception(self._failed(target, state, error))
                return target
        self._flight = self._thread.submit(self._write, target, model, optimizer, state, preprocess or {}, since)
        if not self._background:
            self.wait()
        return target

    def wait(self) -> BaseException | None:
        """Return when no save is in flight: None if the newest is on the disk, else the RunError that says why not."""
        return self._flight.exception() if self._flight else None

    def newest(self, *, valid: Callable[[int, int], bool] = lambda step, owner: True) -> tuple[Saved | None, list[str]]:
        """The newest whole checkpoint that is ``valid`` by its step and owner, and what is wrong with each newer one.

        None only where there is no checkpoint, or none that is ``valid``; RunError where the others are all damaged, or
        where one cannot be read for a reason that may pass.
        """
        damage, ousted = list[str](), list[str]()
        for path in reversed(self.paths()):
            try:
                saved = open_checkpoint(path)
            except Damaged as error:
                damage.append(str(error))
                continue
            step, owner = saved.state["step"], saved.state.get("owner", 0)
            if valid(step, owner):
                return saved, damage + ousted
            ousted.append(f"checkpoint {path} is of owner {owner}, who had lost the run to another")
        if damage:
            raise RunError(
                f"no whole checkpoint is left: {'; '.join(damage)}; restore one, or start afresh in another run.dir"
            )
        return None, ousted

    def set_aside(self, newest: Saved | None) -> None:
        """Rename whatever `newest` passed over, so that its steps can be saved again and it is not kept for newer."""
        for path in self.paths():
            plain = self.root / name_of(step_of(path))
            if newest is None or step_of(path) > newest.state["step"]:
                aside = plain.with_suffix(".damaged")
                _remove(aside)
                path.rename(plain.with_suffix(f".{time.time_ns()}.damaged") if os.path.lexists(aside) else aside)
            elif path != plain:
                path.rename(plain)

    def paths(self) -> list[Path]:
        """Everything under the name of a checkpoint, whole or not, by step. Raises OSError where that cannot be read:
        a disk that fails is not an empty one."""
        try:
            names = os.listdir(self.root)
        except FileNotFoundError:
            return []
        found: dict[int, Path] = {}
        for name in sorted(names):  # a dot comes first, so that what replaces counts
            path = self.root / name
            if re.fullmatch(r"\d+|\.\d+\.replaced", name, re.ASCII):
                plain = self.root / name_of(step := step_of(path))
                if path in (plain, _hidden(plain, "replaced")):
                    found[step] = path
        return [found[step] for step in sorted(found)]

    def best_of(self, paths: Sequence[Path]) -> Path | None:
        """The one with the best metric, of those that have it."""
        scores = {path: score for path in paths if (score := _score(path, self._best)) is not None}
        choose = max if self._best_is == "max" else min
        return choose(scores, key=lambda path: scores[path], default=None)

    def _write(
        self, target: Path, model: State, optimizer: State, state: State, preprocess: State, since: float
    ) -> None:
        """Write to a hidden directory, flush every file to the disk, rename; then delete what need not be kept."""
        began, owner = time.perf_counter(), state["owner"]
        part = _hidden(target, f"{owner}.{time.time_ns()}.part")
        try:
            self._check()
            self._sweep(owner)
            part.mkdir(parents=True)
            save_file(_apart(model), part / MODEL)
            with (part / OPTIMIZER).open("wb") as file:
                torch.save(optimizer, file)
            save_file(preprocess, part / PREPROCESS)
            (part / STATE).write_text(json.dumps(state, indent=2))
            (part / MANIFEST).write_bytes(manifest_of(sums_of(part)))
            for path in (*(part / name for name in FILES), part):
                _flush(path)
            self._check()
            _replace(target, part)
            for path in (self.root, self.root.parent):
                _flush(path)
        except Exception as error:  # no fault of a save may end a run that can go on, nor go unseen
            _remove(part)
            raise self._failed(target, state, error) from error
        where = {"step": state["step"], "samples": state["samples"]}
        try:
            self._prune(target)
            self._sweep(owner)
        except Exception as error:  # the checkpoint is on the disk
            message = f"an older checkpoint than {target} cannot be deleted: {error}"
            self.events.append({"event": "warning", "code": "checkpoint_kept", **where, "message": message})
        ended = time.perf_counter()
        stall = (began if self._background else ended) - since
        self.events.append({"event": "checkpoint", **where, "stall_seconds": stall, "write_seconds": ended - began})

    def _failed(self, target: Path, state: State, error: BaseException) -> RunError:
        # torch buries what the disk said under an error of its own.
        cause = error.__context__ if type(error) is RuntimeError and error.__context__ else error
        message = f"checkpoint {target} cannot be written: {cause}; older checkpoints are untouched"
        where = {"step": state["step"], "samples": state["samples"]}
        self.events.append({"event": "warning", "code": "checkpoint_failed", **where, "message": message})
        return RunError(message)

    def _sweep(self, owner: int) -> None:
        """Delete, as far as possible, what killed saves left: nothing of a later owner, nor the only copy of a step."""
        for path in self.root.glob(".[0-9]*.*"):
            step, whose, kind = match.groups() if (match := HIDDEN.fullmatch(path.name)) else ("", None, None)
            if kind == "old" or (kind == "part" and int(whose or 0) <= owner):
                _remove(path)
            elif kind == "replaced" and os.path.lexists(self.root / step):
                _discard(path)

    def _prune(self, newest: Path) -> None:
        paths = self.paths()
        paths = paths[: paths.index(newest) + 1]  # a later one is none of this run's
        best = self.best_of(paths)
        errors = [error for path in paths[: -self._keep] if path != best and (error := _discard(path))]
        if errors:
            raise errors[0]


def open_newest(root: Path) -> Saved:
    """The newest whole checkpoint under ``root``; damaged ones after it are named on standard error."""
    saved, damage = Checkpoints(root, keep=1, best="", best_is="max").newest()
    for message in damage:
        print(f"bigbatch: {message}", file=sys.stderr)
    if saved is None:
        raise RunError(f"{root}: no checkpoint yet; train first")
    return saved


def on_host(value: Any, before: Any = None) -> Any:
    """A copy in host memory of the tensors in nested dicts, lists and tuples, made in that of an earlier copy,
    ``before``, where it has the like in the same place.

    From a GPU it goes to pinned memory, and may still be on its way on return.
    """
    if isinstance(value, dict):
        named = before if isinstance(before, dict) else {}
        return {key: on_host(item, named.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        listed = before if isinstance(before, list | tuple) else ()
        return type(value)(map(on_host, value, chain(listed, repeat(None))))
    if not isinstance(value, Tensor):
        return value
    if not isinstance(before, Tensor) or (before.shape, before.dtype) != (value.shape, value.dtype):
        before = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return before.copy_(value, non_blocking=True)


def _apart(tensors: State) -> State:
    """Tensors as safetensors takes them: in their plain order, which convolution weights may not have, and a tied
    weight in memory of its own for each of its names."""
    apart: State = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart


def _score(path: Path, metric: str) -> float | None:
    try:
        sums, state = (json.loads((path / name).read_text()) for name in (MANIFEST, STATE))
        value = state["metrics"][metric] if sums[STATE] == sha256(path / STATE) else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):  # else nothing is pruned
        return None
    return value if isinstance(value, float) and value == value else None


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _replace(target: Path, part: Path) -> None:
    """Give ``part`` the name ``target``. What had it is at no moment without a name that `Checkpoints.paths` knows."""
    replaced = _hidden(target, "replaced")
    if os.path.lexists(target):
        _discard(replaced)
        target.rename(replaced)
    try:
        part.rename(target)
    except OSError:
        with suppress(OSError):
            replaced.rename(target)
        raise


def _discard(path: Path) -> OSError | None:
    """Delete a checkpoint, which is whole or not there meanwhile, too. The error if it keeps its name."""
    old = path.with_name(f".{name_of(step_of(path))}.{time.time_ns()}.old")
    try:
        path.rename(old)
    except OSError as error:
        return error
    _remove(old)
    return None


def _remove(path: Path) -> None:
    """Delete as far as possible: the next save tries again."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
