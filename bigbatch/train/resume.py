"""How a run goes on: as the owner of its directory, from the newest whole checkpoint, if that is of the same run."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bigbatch.config import ConfigError, RunConfig
from bigbatch.data.preprocess import State
from bigbatch.dist import Runtime

from .checkpoint import Checkpoints
from .lease import Lease
from .saved import Damaged, Saved, peek
from .state import Clock, Parts, RunError

T = TypeVar("T")

UNFIT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)
"""What the system says of a directory that will be no better the next time."""

FREE_ON_RESUME = ("run", "eval", "checkpoint", "tracking", "parallel", "debug")
"""Sections that may change when a run goes on; everything else defines which run it is."""


def find(parts: Parts, checkpoints: Checkpoints, lease: Lease) -> tuple[Saved | None, Sequence[str]]:
    """Own the directory and look for the newest checkpoint there; also what is wrong with each newer one.

    Rank 0 does both and all use what it found, so that no two processes go on from different steps. RunError where
    another owner does not end, or where no checkpoint is whole; ConfigError where the directory cannot be used.
    """
    timeout, seconds = parts.config.parallel.timeout, parts.config.run.lease
    # It may take longer to become the owner than a collective may take.
    while not on_rank_0(parts, partial(lease.acquire, patience=timeout / 4, limit=max(timeout, 2 * seconds))):
        continue
    return on_rank_0(parts, partial(checkpoints.newest, valid=lease.valid))


def preprocess_of_run(config: RunConfig, runtime: Runtime) -> State | None:
    """What the run in ``run.dir`` preprocesses with, on every process; None where there is none to go on with.

    ConfigError where the directory holds another run. Whether the checkpoint is whole is seen when it is restored.
    """

    def look() -> State | None:
        for path in reversed(Checkpoints(Path(config.run.dir) / "checkpoints", keep=1, best="", best_is="max").paths()):
            with suppress(Damaged):
                saved = peek(path)
                _check_same_run(config, saved.state["recipe"], path)
                return saved.preprocess()
        return None

    return _on_rank_0(config, runtime, look)


def restore(parts: Parts, saved: Saved) -> Clock:
    """Load a checkpoint and return where it was taken. ConfigError where it is of another run."""
    state = saved.state
    _check_same_run(parts.config, state["recipe"], saved.path)
    if (digest := parts.loader.dataset.digest) != (state.get("data") or digest):
        raise ConfigError(f"data: its content or tokenizer is not what {saved.path} was trained on; give a new run.dir")
    parts.strategy.load(saved.model(), saved.optimizer())
    if parts.preprocessing:
        parts.preprocessing.load(saved.preprocess())
    if parts.scale and state["loss_scale"]:
        parts.scale.__dict__.update(state["loss_scale"])
    return Clock(**{name: state[name] for name in asdict(Clock())})


def check_classes(parts: Parts, saved: Saved) -> None:
    """ConfigError where the data's classes are not those that the model has learnt."""
    if "spec" not in saved.state:
        return  # of an earlier version
    now, then = parts.loader.dataset.spec, saved.spec()
    pairs = enumerate(zip(now.names, then.names, strict=False))
    wrong = [f"class {i} is {ours!r}, and was {theirs!r}" for i, (ours, theirs) in pairs if ours != theirs]
    if now.classes != then.classes:
        wrong.append(f"there are {now.classes} classes, and were {then.classes}")
    if wrong:
        raise ConfigError(f"data: {wrong[0]} to {saved.path}; have the classes of its training, in their order")


def on_rank_0(parts: Parts, function: Callable[[], T]) -> T:
    """What the function returns or raises on rank 0, on every process.

    ConfigError for a directory that the user must change, RunError for a disk that may be well the next time.
    """
    return _on_rank_0(parts.config, parts.runtime, function)


def _on_rank_0(config: RunConfig, runtime: Runtime, function: Callable[[], T]) -> T:
    found: Any = None
    if runtime.rank == 0:
        try:
            found = function()
        except RunError as error:
            found = error
        except (OSError, ValueError) as error:
            where = f"run.dir = {config.run.dir!r}"
            if isinstance(error, OSError) and error.errno not in UNFIT:
                found = RunError(f"{where}: {error}; the same command goes on when the disk works again")
            else:
                found = ConfigError(f"{where}: cannot be used ({error}); give another directory")
    found = runtime.agree(found)
    if isinstance(found, Exception):
        raise found
    return found  # type: ignore[no-any-return]


def _identity(config: RunConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json", by_alias=True, exclude=set(FREE_ON_RESUME))
    del tree["batch"]["micro"], tree["batch"]["micro_limit"]
    shards = ("train", "validation", "test") if config.data.name == "shards" else ()  # whose rows the digest tells
    for where in ("path", "download", "cache", "cache_bytes", "workers", "prefetch", "unreadable", *shards):
        tree["data"].pop(where, None)
    # Rounded gradients are another run; how they lie over the processes is not.
    tree["parallel"] = {"compression": config.parallel.compression}
    return json.loads(json.dumps(tree))  # type: ignore[no-any-return]


def _check_same_run(config: RunConfig, recipe: dict[str, Any], path: Path) -> None:
    # Settings that were not there yet had the effect of their defaults.
    try:
        theirs = _flat(_identity(RunConfig.model_validate(recipe)))
    except ValueError as error:
        raise ConfigError(f"{path}: its recipe is of another version ({error}); give a new run.dir") from None
    ours = _flat(_identity(config))
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            raise ConfigError(
                f"{key} = {ours.get(key)!r}: the run in {path.parent.parent} was started with {theirs.get(key)!r}; "
                "set it back to go on, or give a new run.dir"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
