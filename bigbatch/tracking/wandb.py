"""Weights & Biases: one run, one row per logged step, whatever stopped and resumed it."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from bigbatch.config import say
from bigbatch.config.models import Wandb as Settings

from .base import Event, Status, one_line
from .jsonl import read_events

CLOCK = ("step", "samples", "epoch")

FINISH_SECONDS = 120
"""Longest wait for uploads at the end of a run; `wandb sync` uploads the rest from the run's directory."""


class Wandb:
    """Sends steps and evaluations to one W&B run, as a copy of ``metrics.jsonl``. Create it on rank 0 only.

    Metrics are named ``train/…`` or after the split; ``samples`` is the x axis. What is logged at one step becomes one
    row, committed when the next step begins or the run ends. The run's id is kept in ``wandb_id.txt``, and a resumed
    run goes on under it. Rows never go back: a step that W&B already has is dropped, and one that a killed process took
    with it is filled in from ``metrics.jsonl``. What W&B has, the server says (online) or the logs under ``wandb/``
    (offline, where every start adds a directory of its own). A server that does not answer within ``patience`` seconds
    is done without: this start is kept offline.
    """

    def __init__(self, config: Settings, *, dir: Path, resume_step: int | None, patience: float = 30.0) -> None:
        self._config = config
        self._patience = patience
        self._dir = dir
        self._resume_step = resume_step
        self._row: dict[str, Any] = {}
        self._last = -1

    def start(self, config: dict[str, Any], plan: dict[str, Any]) -> None:
        import wandb

        run_id, mode, everything = self._run_id(), self._config.mode, {**config, "plan": plan}
        try:
            self._run = self._init(run_id, mode, everything)
        except Exception as error:
            if mode != "online" or wandb.run:
                raise
            wandb.teardown()  # W&B's process goes on trying under this id; it would end a run of the caller's too
            mode, later = "offline", f"`wandb sync {self._dir}/wandb/offline-run-*` sends it later"
            say(f"no W&B server: {one_line(error)}; the run is kept offline, and {later}", who="tracking")
            self._run = self._init(run_id, mode, everything)
        if mode == "online":
            self._last = self._run.starting_step - 1
            say(self._run.url, who="wandb")
        else:
            self._last = _last_step(self._dir / "wandb", run_id)
        self._run.define_metric("samples")
        self._run.define_metric("*", step_metric="samples")
        if self._resume_step is not None:
            for event in read_events(self._dir / "metrics.jsonl", until=self._resume_step):
                self.log(event)

    def _init(self, run_id: str, mode: Literal["disabled", "offline", "online"], config: dict[str, Any]) -> Any:
        import wandb

        ours = self._config
        return wandb.init(
            id=run_id,
            resume="allow",
            mode=mode,
            project=ours.project,
            entity=ours.entity,
            name=ours.name,
            tags=ours.tags,
            dir=str(self._dir),
            config=config,
            allow_val_change=True,  # a run may go on with another world size
            reinit="create_new",  # leave alone what the caller's own script does with wandb
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=self._patience, finish_timeout=FINISH_SECONDS
            ),
        )

    def log(self, event: Event) -> None:
        if event["event"] not in ("step", "eval") or event["step"] <= self._last:
            return
        if self._row and self._row["step"] != event["step"]:
            self._commit()
        prefix = "train" if event["event"] == "step" else event["split"]
        for name, value in event.items():
            if isinstance(value, (int, float)):
                self._row[name if name in CLOCK else f"{prefix}/{name}"] = value

    def sync(self) -> None:
        """Nothing here outlives more than it does already."""

    def finish(self, status: Status) -> None:
        if self._row:
            self._commit()
        if status == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status == "done" else 1)

    def _commit(self) -> None:
        self._run.log(self._row, step=self._row["step"], commit=True)
        self._last, self._row = self._row["step"], {}

    def _run_id(self) -> str:
        path = self._dir / "wandb_id.txt"
        if self._resume_step is not None and path.exists():
            return path.read_text(encoding="utf-8").strip()
        run_id = secrets.token_hex(4)
        self._dir.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{run_id}\n", encoding="utf-8")
        return run_id


def _last_step(root: Path, run_id: str) -> int:
    """The newest step in the local logs of a run, -1 where there is none."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    last = -1
    for path in root.glob(f"*run-*-{run_id}*/run-{run_id}.wandb"):
        for payload in _payloads(path):
            record = Record.FromString(payload)
            if record.HasField("history"):
                last = max(last, record.history.step.num)
    return last


def _payloads(path: Path) -> Iterator[bytes]:
    """The records of a W&B log, as far as it is whole: a killed process leaves its last one torn.

    LevelDB's log format behind 7 bytes of its own: blocks of 32 KiB, in them chunks of CRC-32, length and kind (1 a
    record, 2 to 4 the first, a middle and the last part of one); fewer than 7 bytes at a block's end are padding.
    """
    with path.open("rb") as file:
        payload, at = b"", 7
        while block := file.read(1 << 15):
            while at + 7 <= len(block):
                _, length, kind = struct.unpack_from("<IHB", block, at)
                at += 7 + length
                if at > len(block):
                    return
                payload += block[at - length : at]
                if kind in (1, 4):
                    yield payload
                    payload = b""
            at = 0
