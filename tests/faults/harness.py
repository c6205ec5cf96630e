"""Breaks short digits runs in the ways in which one machine can break, and compares what becomes of them, bit for bit.

    python tests/faults/harness.py kill --times 100 --ranks 3 --seed 0

Every rank is a process of its own that runs `bigbatch train` under the variables that a launcher sets. A broken run is
started again until it ends; then its parameters, and every step and evaluation in its metrics, must be those of a run
that was let be. The seed draws when a fault strikes and whom. What takes a launcher or several machines (a lost node, a
cut network, a requeued job) is in `tests/launch` and `tests/slurm`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "accelerate", "sklearn.datasets", "bigbatch.train"]

PATIENCE = 20.0
"""Seconds in which a rank must notice that another is gone; one that takes longer hangs."""

WHOLE = 120.0
"""Seconds in which a start that is let be must end."""

KILLS = 10
"""Times that one run is killed at most."""

RECIPE = """
seed: 3
duration: 8ep
batch: {global: 96}
optim: {name: lars, lr: 1.0, weight_decay: 5.0e-4, trust_coefficient: 0.02}
warmup: {kind: gradual, duration: 20%, start: zero}
norm: {kind: batch, span: 8}
task: {name: classification, model: bigbatch/resnet_small, options: {widths: [4, 8]}}
data: {name: digits, augment: {shift: 1}}
eval: {every: 2ep}
checkpoint: {every: 3st}
tracking: {console: lines}
parallel: {timeout: 5, heartbeat: 1}
"""


STEPS = 91
"""What it takes: 8 epochs of 1,085 samples in windows of 96."""


class Problem(Exception):
    """A run that hangs, fails for good, or ends as another one."""


# -------------------------------------------------------------------------------------------------------- a run


def rank_main(rank: int, environment: dict[str, str], output: Path, arguments: list[str]) -> None:
    """What a launcher would start, in a process that has torch loaded already."""
    os.environ.update(environment, RANK=f"{rank}", LOCAL_RANK=f"{rank}")
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    sys.argv = ["bigbatch", *arguments]
    from bigbatch.cli import entry

    entry()


@dataclass
class Run:
    """A run directory, and the processes of its present start."""

    path: Path
    ranks: int
    output: Path
    environment: dict[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    starts: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    clean: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    processes: list[ForkServerProcess] = field(default_factory=list)
    started: float = 0.0

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = {"WORLD_SIZE": f"{self.ranks}", "LOCAL_WORLD_SIZE": f"{self.ranks}"}
        environment = {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", **self.environment}
        arguments = ["train", str(self.path.parent / "recipe.yaml"), f"run.dir={self.path}", *self.overrides]
        job = (environment, self.output, arguments)
        context = multiprocessing.get_context("forkserver")
        self.processes = [context.Process(target=rank_main, args=(r, *job), daemon=True) for r in range(self.ranks)]
        self.starts, self.started = self.starts + 1, time.time()
        for process in self.processes:
            process.start()

    def reach(self, condition: Callable[[], bool]) -> bool:
        """Wait until it is so; False if a rank ends first."""
        while all(process.is_alive() for process in self.processes):
            if condition():
                return True
            time.sleep(0.001)
        return False

    def strike(self, signal_: signal.Signals, *processes: ForkServerProcess) -> None:
        self.struck[self.phase()] += 1
        for process in processes:
            os.kill(process.pid or 0, signal_)

    def end(self, seconds: float = PATIENCE, *, without: ForkServerProcess | None = None) -> list[int | None]:
        """The ranks' exit codes. Problem if one does not end in time."""
        deadline = time.monotonic() + seconds
        awaited = [process for process in self.processes if process is not without]
        for process in awaited:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in awaited]
        if None in codes:
            for process in self.processes:
                process.kill()
            raise Problem(f"start {self.starts} hangs for {seconds:g} s (exit codes {codes})")
        return codes

    def complete(self) -> None:
        """Start and let be; Problem if that is not the end of the run."""
        self.start()
        if any(codes := self.end(WHOLE)):
            raise Problem(f"start {self.starts}, which was let be, ends with exit codes {codes}")

    def phase(self) -> str:
        """What the run is doing, by what is in its directory."""
        for path, name in (
            ("summary.json", "ending"),
            (f"checkpoints/*{STEPS}", "ending"),
            ("checkpoints/.*", "saving"),
            ("metrics.jsonl", "training"),
        ):
            with contextlib.suppress(FileNotFoundError):
                if any(found.stat().st_mtime > self.started for found in self.path.glob(path)):
                    return name
        return "starting"

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        events = map(json.loads, (self.path / "metrics.jsonl").read_text().splitlines())
        return [
            {key: value for key, value in event.items() if key != "samples_per_second"}
            for event in events
            if event["event"] in kinds
        ]

    def parameters(self) -> str:
        return str(json.loads((self.path / "summary.json").read_text())["parameters_sha256"])


# ------------------------------------------------------------------------------------------------------- faults


def kill(run: Run, draw: random.Random, seconds: float, times: int) -> None:
    """SIGKILL to one rank, at any time, within saves and at the end, again and again."""
    for _ in range(draw.randint(1, min(times, KILLS))):
        run.start()
        phase = draw.choice(["any"] * 4 + ["saving"] * 5 + ["ending"])
        delay = draw.uniform(0, seconds * 0.6) if phase != "ending" else 0.0
        if not run.reach(lambda: time.time() - run.started > delay and phase in ("any", run.phase())):  # noqa: B023
            break
        time.sleep(draw.uniform(0, 0.01))
        first = phase != "any" and draw.random() < 0.5  # it saves, and ends last
        run.strike(signal.SIGKILL, run.processes[0 if first else draw.randrange(run.ranks)])
        run.end()
    if run.struck and any(run.end()):
        run.complete()


def node(run: Run, draw: random.Random, seconds: float, times: int) -> None:
    """SIGKILL to all ranks at once."""
    run.start()
    if run.reach(after(run, draw.uniform(0, seconds))):
        run.strike(signal.SIGKILL, *run.processes)
    run.end()
    run.complete()


def stop(run: Run, draw: random.Random, seconds: float, times: int) -> None:
    """SIGSTOP to one rank: the others end in time, and so does it once it goes on."""
    run.start()
    if run.reach(after(run, draw.uniform(0, seconds))):
        stopped = draw.choice(run.processes)
        run.strike(signal.SIGSTOP, stopped)
        try:
            run.end(without=stopped)
        finally:
            os.kill(stopped.pid or 0, signal.SIGCONT)
    run.end()
    run.complete()


def pause(run: Run, draw: random.Random, seconds: float, times: int) -> None:
    """SIGSTOP to one rank for a second: nothing happens."""
    run.start()
    if run.reach(after(run, draw.uniform(0, seconds))):
        paused = draw.choice(run.processes)
        run.strike(signal.SIGSTOP, paused)
        time.sleep(1)
        os.kill(paused.pid or 0, signal.SIGCONT)
    if any(codes := run.end(WHOLE)):
        raise Problem(f"a pause of a second ends the run with exit codes {codes}")


def disk(run: Run, draw: random.Random, seconds: float, times: int) -> None:
    """The disk is full for a second."""
    run.path.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", run.path], capture_output=True, text=True)
    if mount.returncode:
        raise Problem(f"no small disk to fill: {mount.stderr.strip()}")
    run.clean.callback(subprocess.run, ["umount", "--lazy", run.path], check=True)
    run.start()
    if run.reach(after(run, draw.uniform(0, seconds))):
        run.strike(signal.SIGCONT)
        filler = run.path / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        time.sleep(1)
        filler.unlink()
    if any(run.end(WHOLE)):
        run.complete()


def flip(run: Run, draw: random.Random, seconds: float, times: int) -> None:
    """One bit of the newest checkpoint turns, after all ranks were killed."""
    run.start()
    least, whole = draw.randint(2, 20), list[Path]()

    def saved() -> bool:
        whole[:] = sorted((run.path / "checkpoints").glob("[0-9]*"))
        return bool(whole) and int(whole[-1].name) >= 3 * least

    if run.reach(saved):
        run.strike(signal.SIGKILL, *run.processes)
        run.end()
        saved()
        file = draw.choice(sorted(whole[-1].iterdir()))
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    run.end()
    run.complete()
    if run.struck and not any(event["code"] == "damaged_checkpoint" for event in run.events("warning")):
        raise Problem("nobody was told of the damaged checkpoint")


def pipe(run: Run, draw: random.Random, seconds: float, times: int) -> None:
    """Whoever reads standard output and standard error leaves."""
    os.mkfifo(run.output)
    run.clean.callback(run.output.unlink)
    reader = os.open(run.output, os.O_RDONLY | os.O_NONBLOCK)
    run.start()
    run.reach(lambda: run.phase() != "starting")
    if run.reach(after(run, draw.uniform(0, seconds))):
        run.strike(signal.SIGCONT)
    os.close(reader)
    if any(codes := run.end(WHOLE)):
        raise Problem(f"without a reader the run ends with exit codes {codes}")


def wandb(run: Run, draw: random.Random, seconds: float, times: int) -> None:
    """There is no Weights & Biases server."""
    run.environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    run.overrides = ("tracking.wandb.mode=online", "parallel.timeout=30")
    run.struck["starting"] += 1
    run.complete()
    if not list(run.path.glob("wandb/offline-run-*")):
        raise Problem("nothing is kept to be sent later")


def after(run: Run, seconds: float) -> Callable[[], bool]:
    return lambda: time.time() - run.started > seconds


Fault = Callable[[Run, random.Random, float, int], None]
"""Breaks a run that takes so many seconds, at most so many times, and leaves it complete."""

FAULTS: dict[str, Fault] = {f.__name__: f for f in (kill, node, stop, pause, disk, flip, pipe, wandb)}


# ----------------------------------------------------------------------------------------------------- the tool


def undisturbed(work: Path, ranks: int) -> tuple[Run, float]:
    """A run that is let be, and the seconds it takes."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    warm = multiprocessing.get_context("forkserver").Process(target=int)
    warm.start()
    warm.join()
    (work / "recipe.yaml").write_text(RECIPE)
    run = Run(work / "whole", ranks, work / "whole.log")
    run.complete()
    return run, time.time() - run.started


def campaign(
    name: str, *, times: int, whole: Run, seconds: float, draw: random.Random
) -> tuple[Counter[str], list[str]]:
    """Break runs until the fault has struck so often; what was counted, and what went wrong."""
    counts: Counter[str] = Counter()
    problems: list[str] = []
    struck = 0
    while struck < times and counts["runs"] < 2 * times:
        path = whole.path.parent / f"{name}-{counts['runs']}"
        run = Run(path, whole.ranks, path.with_suffix(".log"))
        with run.clean:
            try:
                FAULTS[name](run, draw, seconds, times - struck)
                if run.events("step", "eval") != whole.events("step", "eval"):
                    raise Problem("the steps and evaluations in its metrics are not the undisturbed run's")
                if run.parameters() != whole.parameters():
                    raise Problem("its parameters are not the undisturbed run's")
                counts["equal"] += 1
            except (Problem, OSError, ValueError) as problem:
                problems.append(f"{path}: {problem!r}")
        struck += run.struck.total()
        counts += Counter(runs=1, starts=run.starts) + run.struck
        print(f"{path.name}: struck {dict(run.struck)}, {run.starts} starts", file=sys.stderr, flush=True)
    return counts, problems


COLUMNS = ("starting", "training", "saving", "ending", "starts", "runs", "equal")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = "; ".join(f"{name}: {fault.__doc__}" for name, fault in FAULTS.items())
    parser.add_argument("faults", nargs="+", choices=FAULTS, metavar="FAULT", help=told)
    parser.add_argument("--times", type=int, default=10, help="times that each fault strikes (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws when and whom (%(default)s)")
    parser.add_argument("--work", type=Path, help="directory to keep the runs in; default: one that is removed")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        work.mkdir(parents=True, exist_ok=True)
        whole, seconds = undisturbed(work, args.ranks)
        print(f"{args.ranks} ranks, seed {args.seed}; an undisturbed run takes {seconds:.1f} s")
        print(f"{'fault':<8}" + "".join(f"{column:>10}" for column in COLUMNS))
        problems = []
        for name in args.faults:
            draw = random.Random(f"{name} {args.seed}")
            counts, wrong = campaign(name, times=args.times, whole=whole, seconds=seconds, draw=draw)
            print(f"{name:<8}" + "".join(f"{counts[column]:>10}" for column in COLUMNS), flush=True)
            problems += wrong
        for problem in problems:
            print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    sys.exit(main())
