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
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from bigbatch.cli import FAILED, OK, _positive, _rank, _world_size
from bigbatch.config.models import Parallel

from .launch import LOCAL, start
from .watchdog import Limits

TIMEOUT, PATIENCE = 60.0, 10.0
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
        command, limits = ["doctor", "--dir", str(args.dir), *["--json"] * args.json], Limits(TIMEOUT, TIMEOUT, 1.0)
        return start(command, name="doctor", nproc=args.nproc, nodes=(1, 1), head=LOCAL, restarts=0, limits=limits)
    report = Report()
    _processors(report)
    if not report.broken:
        _exchange(report)
    _room(report, args.dir.resolve())
    if _rank() == 0:
        print(json.dumps(asdict(report), indent=2) if args.json else _text(report))
    return FAILED if report.broken else OK


def _processors(report: Report) -> None:
    import torch

    facts, cuda = report.facts, torch.cuda
    driver = shutil.which("nvidia-smi") if _rank() == 0 else None
    if driver:
        try:
            facts["interconnect"] = _topology()
        except subprocess.TimeoutExpired:
            report.broken.append(f"nvidia-smi has not answered for {PATIENCE:g} s: the driver hangs; see dmesg, reboot")
            return  # CUDA would not answer either
    facts |= {"Python": platform.python_version(), "torch": version("torch"), "accelerate": version("accelerate")}
    nccl = cuda.nccl.version() if torch.distributed.is_nccl_available() else ()  # type: ignore[no-untyped-call]
    facts |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, nccl)) or "none"}
    facts["gloo"] = "available" if torch.distributed.is_gloo_available() else "none"
    names = [cuda.get_device_name(number) for number in range(cuda.device_count())]
    facts["GPUs"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "none"
    here, cores = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), len(os.sched_getaffinity(0))
    if names and here > len(names):
        report.broken.append(f"{here} processes on {len(names)} GPUs: each needs its own")
    if driver and not names:
        report.doubts.append(f"nvidia-smi is here and torch (CUDA {torch.version.cuda}) sees no GPU: old driver?")
    facts["threads"] = f"OMP_NUM_THREADS = {torch.get_num_threads()} × {here} processes on {cores} cores"
    if torch.get_num_threads() * here > cores:
        report.doubts.append(f"{facts['threads']}: set OMP_NUM_THREADS={max(1, cores // here)}")


def _topology() -> str:
    """Raises TimeoutExpired soon, even where the driver does not let nvidia-smi be killed."""
    with tempfile.TemporaryFile("w+") as answer:
        asked = subprocess.Popen(["nvidia-smi", "topo", "-m"], stdout=answer, stderr=subprocess.DEVNULL)
        try:
            asked.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            asked.kill()
            asked.wait(1)
            raise
        answer.seek(0)
        return answer.read().partition("Legend")[0].strip()


def _room(report: Report, directory: Path) -> None:
    there = next(path for path in (directory, *directory.parents) if path.exists())
    for place in (there, Path("/dev/shm")):
        free = shutil.disk_usage(place).free / 2**30
        report.facts[f"free in {place}"] = f"{free:.1f} GiB"
        if free < 1:
            report.doubts.append(f"{place} has {free:.2f} GiB left: checkpoints, NCCL and data loaders need room")
    if not os.access(there, os.W_OK | os.X_OK):
        report.broken.append(f"{there} cannot be written to")
    report.facts["open files"] = str(files := resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if 0 <= files < 4096:
        report.doubts.append(f"ulimit -n is {files}: connections and data loaders may need more; 4096 is enough")


def _exchange(report: Report) -> None:
    """What takes all processes: the time and speed of an all-reduce, medians, and their clocks."""
    report.facts["clock"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if _world_size() == 1:
        return
    import torch

    from bigbatch.dist import Runtime

    try:
        with Runtime(parallel=Parallel(timeout=TIMEOUT)) as runtime:
            for name, size in SIZES.items():
                tensor, seconds = torch.zeros(size // 4, device=runtime.device), []
                for _ in range(REPEATS):
                    start = time.perf_counter()
                    runtime.sum(tensor)
                    tensor[0].item()  # waits for a GPU
                    seconds.append(time.perf_counter() - start)
                median = statistics.median(seconds[1:])  # the first one also connects
                sent = 2 * (runtime.world_size - 1) / runtime.world_size * size
                speed = f"{median * 1e3:.3g} ms, {sent / median / 1e9:.3g} GB/s out of each process"
                report.facts[f"all-reduce {name}"] = speed
            clocks = runtime.gather(torch.tensor([time.time()], dtype=torch.float64, device=runtime.device))
    except (RuntimeError, ValueError) as error:
        report.broken.append(f"the processes cannot talk: {error}")
        return
    if (apart := float(clocks.max() - clocks.min())) > 1:
        report.doubts.append(f"clocks are {apart:.3g} s apart, so logs of different machines do not fit together")


def _text(report: Report) -> str:
    lines = [f"{name:24} {value}" for name, value in report.facts.items()]
    lines += [f"looks wrong: {line}" for line in report.doubts] + [f"broken: {line}" for line in report.broken]
    return "\n".join(lines)
