"""``bigbatch doctor``: what this machine has to train with, how fast its processes talk, and what looks wrong."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from bigbatch.cli import FAILED, OK, _positive, _rank, _world_size
from bigbatch.config.models import Parallel

from .launch import start

if TYPE_CHECKING:
    from bigbatch.dist import Runtime

TIMEOUT = 60.0
SIZES = {"4 B": 4, "1 MiB": 2**20, "64 MiB": 2**26}
REPEATS = 11


@dataclass
class Report:
    """``doubts`` slow a run down or may end it; with what is ``broken`` there is none."""

    facts: dict[str, str] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def add_to(verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = verb("doctor", run, "Show what this machine has to train with, and what looks wrong.", recipe=False)
    parser.add_argument("--nproc", type=_positive, help="measure all-reduce between so many processes; or use torchrun")
    parser.add_argument("--dir", type=Path, default=Path(), help="where runs are to be written (default: here)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """The verb. Exit codes: 0, and 1 where something is broken."""
    if args.nproc and "WORLD_SIZE" not in os.environ:
        command = ["doctor", "--dir", str(args.dir), *["--json"] * args.json]
        return start(command, name="doctor", nproc=args.nproc, timeout=TIMEOUT, grace=TIMEOUT)
    report = Report()
    _software(report)
    _hardware(report)
    _room(report, args.dir.resolve())
    _exchange(report)
    if _rank() == 0:
        print(json.dumps(asdict(report), indent=2)) if args.json else _show(report)
    return FAILED if report.broken else OK


def _software(report: Report) -> None:
    import torch

    facts, dist = report.facts, torch.distributed
    facts["Python"] = platform.python_version()
    facts |= {name: version(name) for name in ("torch", "accelerate")}
    facts["CUDA"] = str(torch.version.cuda)
    nccl = torch.cuda.nccl.version() if dist.is_nccl_available() else ()  # type: ignore[no-untyped-call]
    facts["NCCL"], facts["gloo"] = ".".join(map(str, nccl)) or "none", str(dist.is_gloo_available())
    if not dist.is_gloo_available():
        report.broken.append("torch was built without gloo, which CPUs talk over")


def _hardware(report: Report) -> None:
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    report.facts["GPUs"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "none"
    here, cores = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), len(os.sched_getaffinity(0))
    if names and here > len(names):
        report.broken.append(f"{here} processes on {len(names)} GPUs: each needs its own")
    if shutil.which("nvidia-smi"):
        topology = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True).stdout
        report.facts["interconnect"] = topology.partition("Legend")[0].strip()
        if not names:
            report.doubts.append(
                f"nvidia-smi is here, and torch sees no GPU; CUDA {torch.version.cuda} for the driver?"
            )
    report.facts["threads"] = f"OMP_NUM_THREADS = {torch.get_num_threads()} × {here} processes on {cores} cores"
    if torch.get_num_threads() * here > cores:
        report.doubts.append(f"{report.facts['threads']}: set OMP_NUM_THREADS={max(1, cores // here)}")
    report.facts["open files"] = str(files := resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if 0 <= files < 4096:
        report.doubts.append(f"ulimit -n is {files}: connections and data loaders may need more; 4096 is enough")


def _room(report: Report, directory: Path) -> None:
    there = next(path for path in (directory, *directory.parents) if path.exists())
    for place in (there, Path("/dev/shm")):
        free = shutil.disk_usage(place).free / 2**30
        report.facts[f"free in {place}"] = f"{free:.1f} GiB"
        if free < 1:
            report.doubts.append(f"{place} has {free:.2f} GiB left: checkpoints, NCCL and data loaders need room")
    if not os.access(there, os.W_OK | os.X_OK):
        report.broken.append(f"{there} cannot be written to")


def _exchange(report: Report) -> None:
    """What takes all processes: the speed of an all-reduce, and their clocks."""
    report.facts["clock"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if _world_size() == 1:
        return
    import torch

    from bigbatch.dist import Runtime

    try:
        with Runtime(parallel=Parallel(timeout=TIMEOUT)) as runtime:
            share = 2 * (runtime.world_size - 1) / runtime.world_size
            for name, size in SIZES.items():
                seconds = _all_reduce(runtime, size)
                speed = f", {share * size / seconds / 1e9:.3g} GB/s out of each process" if size > 4 else ""
                report.facts[f"all-reduce {name}"] = f"{seconds * 1e3:.3g} ms{speed}"
            clocks = runtime.gather(torch.tensor([time.time()], dtype=torch.float64, device=runtime.device))
    except (RuntimeError, ValueError) as error:
        report.broken.append(f"the processes cannot talk: {error}")
        return
    if (apart := float(clocks.max() - clocks.min())) > 1:
        report.doubts.append(f"clocks are {apart:.3g} s apart, so logs of different machines do not fit together")


def _all_reduce(runtime: Runtime, size: int) -> float:
    """Seconds that a sum of ``size`` bytes over all processes takes, the median."""
    import torch

    tensor, seconds = torch.zeros(size // 4, device=runtime.device), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        runtime.sum(tensor)
        tensor[0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first one also connects


def _show(report: Report) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, show_header=False, pad_edge=False)
    for row in report.facts.items():
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    console.print(table)
    for kind, lines in (("looks wrong", report.doubts), ("broken", report.broken)):
        for line in lines:
            console.print(f"{kind}: {line}", soft_wrap=True)
