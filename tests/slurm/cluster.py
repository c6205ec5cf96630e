"""A SLURM cluster on this machine (lab.sh), and jobs in it."""

from __future__ import annotations

import json
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
        return "a SLURM cluster on one machine takes root, for namespaces"
    if missing := [command for command in COMMANDS if not shutil.which(command)]:
        return f"needs munge, slurmctld, slurmd, slurm-client and iproute2; not found: {', '.join(missing)}"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
    done = subprocess.run([*probe, "ip", "link", "add", "b", "type", "bridge"], capture_output=True, text=True)
    return f"no namespaces or no bridge here: {done.stderr.strip()}" if done.returncode else ""


class Cluster:
    """Nodes n1, n2, … of four CPUs, from ``with`` to its end; everything in them ends with it."""

    def __init__(self, directory: Path, *, nodes: int) -> None:
        self._directory = directory
        self._nodes = nodes

    def __enter__(self) -> Cluster:
        command = ["bash", str(LAB), str(self._directory), "up", str(self._nodes)]
        with (self._directory / "log").open("w") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            until(lambda: self.tell("sinfo", "-h", "-t", "idle", "-o", "%D", check=False) == str(self._nodes), seconds=30)
        except TimeoutError:
            self.__exit__()
            logs = [path.read_text() for path in self._directory.glob("**/*") if path.suffix in (".log", "") and path.name in ("log", "out", "slurmctld.log")]
            raise RuntimeError("\n".join(["no cluster:", *logs])) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def lab(self, *words: str, check: bool = True, **variables: str) -> str:
        """Run lab.sh on this cluster; what it printed."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | variables
        command = ["bash", str(LAB), str(self._directory), *words]
        return subprocess.run(command, cwd=ROOT, env=env, check=check, stdout=subprocess.PIPE, text=True).stdout.strip()
