"""A SLURM cluster on this machine (lab.sh), and jobs in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAB = Path(__file__).with_name("lab.sh")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter", "setpriv")


def why_not() -> str:
    """What keeps a cluster from running here; empty where nothing does."""
    if sys.platform != "linux" or os.geteuid():
        return "a cluster on one machine is made of namespaces, which takes root"
    if missing := [command for command in COMMANDS if not shutil.which(command)]:
        return f"install munge, slurmctld, slurmd, slurm-client and iproute2; not found: {', '.join(missing)}"
    namespaces = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
    probe = [*namespaces, "ip", "link", "add", "bridge", "type", "bridge"]
    done = subprocess.run(probe, capture_output=True, text=True)
    return f"no namespaces or no bridge in this container: {done.stderr.strip()}" if done.returncode else ""


class Cluster:
    """Nodes n1, n2, … of four CPUs. Everything that runs in them ends with the ``with`` block, or with this process."""

    def __init__(self, directory: Path, *, nodes: int) -> None:
        self.directory = directory
        self._nodes = nodes

    def __enter__(self) -> Cluster:
        with (self.directory / "lab.log").open("w") as log:
            command = ["bash", str(LAB), str(self.directory), "up", str(self._nodes)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.until(lambda: self.lab("in", "sinfo", "-ht", "idle", "-o", "%D", check=False) == str(self._nodes))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def lab(self, *words: str, check: bool = True, **variables: str) -> str:
        """Run lab.sh on this cluster; what it printed."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | variables
        command = ["bash", str(LAB), str(self.directory), *words]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 or not check, (words, done.stderr)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode, …"""
        words = self.lab("in", "scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def end(self, number: str) -> dict[str, str]:
        """Wait for a job to end in any way."""
        running = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        self.until(lambda: self.job(number)["JobState"] not in running)
        return self.job(number)

    def until(self, done: Callable[[], bool], seconds: float = 150.0) -> None:
        """Wait for something, with every log there is where it does not come."""
        deadline = time.monotonic() + seconds
        while not done():
            if self._process.poll() is not None or time.monotonic() > deadline:
                logs = sorted({*self.directory.rglob("*.log"), *self.directory.rglob("*.out")})
                tails = [f"==> {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs]
                raise TimeoutError("\n".join(["it has not come, and these are the logs:", *tails]))
            time.sleep(0.1)
