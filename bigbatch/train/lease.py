"""One writer: who owns a run directory, and which of the checkpoints there belong to the run.

``run.dir/owner/<n>.json`` is the file of the directory's n-th owner. It is created exclusively, which holds on NFS too;
to renew the lease is to touch it; who takes over creates the next file and removes those before. So no owner writes to
another one's file, and one that was stopped or cut off in the meantime finds its own gone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from bigbatch.config import say
from bigbatch.dist import repeat

from .state import RunError

Record = dict[str, Any]


class Lease:
    """The right to write to the directory ``run``. It ends when its file has not been touched for ``seconds``.

    ``owner`` is the number of this ownership, 0 before `acquire`; ``lost`` is true once somebody else has taken over.
    """

    def __init__(self, run: Path, *, seconds: float) -> None:
        self.owner, self.lost = 0, False
        self._run, self._folder, self._seconds = run, run.absolute() / "owner", seconds
        self._seen = (0, 0)
        self._since = self._first = time.monotonic()
        self._starts: dict[int, int] = {}
        self._stop: Callable[[], None] = lambda: None

    def acquire(self, *, patience: float, limit: float) -> bool:
        """Become the owner and renew the lease until `release`; False if ``patience`` seconds were not enough.

        An owner that has released the directory, or was a process of this host that is gone, is followed at once. Any
        other one must have left its file untouched for the lease's seconds, by this process's clock and over all calls.
        RunError if it has not ``limit`` seconds after this object was made. OSError if the directory cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + patience
        while not (self._is_free(limit) and self._claim(self._seen[0] + 1)):
            if time.monotonic() > end:
                return False
            time.sleep(min(0.5, self._seconds / 10))
        self._stop = repeat(self.renew, seconds=self._seconds / 5, name="lease")
        return True

    def _is_free(self, limit: float) -> bool:
        number, now = self._newest(), time.monotonic()
        owner, touched = self._read(number)
        before, self._seen = self._seen, (number, touched)
        if before != self._seen:
            self._since = now
        if not number or "released" in owner or _has_ended(owner) or now - self._since >= self._seconds:
            return True
        if now - self._first > limit:
            raise RunError(
                f"run.dir = {self._run}: owned by {_name(owner)}, which has not ended in {limit:g} s; end it, or give "
                "another run.dir"
            )
        if number != before[0]:
            say(f"{self._run} is owned by {_name(owner)}: waiting until it ends or is silent for {self._seconds:g} s")
        return False

    def _claim(self, number: int) -> bool:
        try:
            file = self._path(number).open("x", encoding="utf-8")
        except FileExistsError:
            return False
        with file:
            # Whoever was slow enough has made a file that had been there before.
            if self._newest() > number:
                self._path(number).unlink(missing_ok=True)
                return False
            former = sorted(set(self._numbers()) - {number})
            for old in former:
                record, _ = self._read(old)
                self._starts |= dict(record.get("starts", ()))
                if "from_step" in record:
                    self._starts[old] = record["from_step"]
            _write(file, {"owner": number, **_me(), "starts": list(self._starts.items())})
        for old in former:
            self._path(old).unlink(missing_ok=True)
        self.owner = number
        return True

    def begin(self, step: int) -> None:
        """The run goes on from ``step``: what former owners saved after it is not part of it. Raises as `check`."""
        self.check()
        self._starts[self.owner] = step
        self._append({"from_step": step})

    def valid(self, step: int, owner: int) -> bool:
        """Whether a checkpoint that ``owner`` wrote at ``step`` belongs to the run: no later owner went on from before.

        Owner 0 wrote before there were leases.
        """
        return all(step <= start for number, start in self._starts.items() if number > owner)

    def renew(self) -> None:
        """Touch the file, and see in `lost` whether it still is this owner's turn. OSError if the disk fails."""
        try:
            os.utime(self._path(self.owner))
        except FileNotFoundError:
            self.lost = True
        self.lost = self.lost or self._newest() > self.owner

    def check(self) -> None:
        """Renew, to be called right before a write. RunError where somebody else has taken over."""
        self.renew()
        if self.lost:
            owner, _ = self._read(self._newest())
            raise RunError(f"run.dir = {self._run}: taken over by {_name(owner)}; this process writes no more to it")

    def release(self) -> None:
        """Let the next owner follow at once. Nothing may be written afterwards."""
        self._stop()
        if self.owner and not self.lost:
            with suppress(OSError):
                self._append({"released": True})

    def _append(self, entry: Record) -> None:
        with open(os.open(self._path(self.owner), os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8") as file:
            _write(file, entry)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.json"

    def _numbers(self) -> list[int]:
        return [int(path.stem) for path in self._folder.glob("[0-9]*.json") if path.stem.isdigit()]

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _read(self, number: int) -> tuple[Record, int]:
        """The file's lines as one record, and when it was last touched; a line that is not whole is left out."""
        record: Record = {}
        try:
            # Opened even to see the time: NFS asks the server then, and remembers otherwise.
            with self._path(number).open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    with suppress(ValueError):
                        record |= json.loads(line)
                return record, os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return record, 0


def _write(file: TextIO, entry: Record) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _me() -> Record:
    """This process, so that others find it and know whether it still lives."""
    environ = os.environ
    return {
        "job": environ.get("SLURM_JOB_ID") or environ.get("TORCHELASTIC_RUN_ID"),
        "restart": environ.get("SLURM_RESTART_COUNT") or environ.get("TORCHELASTIC_RESTART_COUNT"),
        "host": socket.gethostname(),
        "place": _place(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _name(owner: Record) -> str:
    if "pid" not in owner:
        return "an unknown process"
    job = f"job {owner['job']}, " if owner["job"] else ""
    return f"{job}process {owner['pid']} on host {owner['host']}"


def _has_ended(owner: Record) -> bool:
    """Whether the owner was a process of this machine that is no longer there."""
    if not owner.get("place") or owner["place"] != _place():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return bool(_started(owner["pid"]) != owner["started"])


def _place() -> str:
    """Which start of which machine, and which of its containers: where a process number means the same process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; nothing for one that has ended and is not yet collected."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except OSError:
        return ""
