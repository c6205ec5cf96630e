"""Network hosts on one machine: each a network namespace with a hostname, all on one bridge."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runs.command import ROOT, environment


class Hosts:
    """``count`` hosts n1, n2, … at 10.99.0.1, 10.99.0.2, …, with TCP's default settings."""

    def __init__(self, count: int) -> None:
        tag = f"bb{os.getpid() % 100_000}"  # an interface's name has 15 characters
        self.bridge, self.names = f"{tag}br", [f"{tag}n{number}" for number in range(1, count + 1)]
        self.started: list[subprocess.Popen[bytes]] = []

    def set_up(self) -> None:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("link", "set", self.bridge, "up")
        for number, name in enumerate(self.names, 1):
            ip("netns", "add", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", name, "master", self.bridge, "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"{address(number)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def run(self, number: int, command: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
        """Start a command on host ``number``; its output goes to ``log``."""
        host = ["ip", "netns", "exec", self.names[number - 1], "unshare", "--uts", "--kill-child", "--pid", "--fork"]
        script = f'hostname n{number}; exec "$@"'
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*host, "--mount-proc", "sh", "-c", script, "sh", *command],
                cwd=ROOT,
                env=environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def cut(self, number: int) -> None:
        """What host ``number`` sends and is sent gets lost from now on; its interface stays up."""
        ip("link", "set", self.names[number - 1], "nomaster")

    def heal(self, number: int) -> None:
        ip("link", "set", self.names[number - 1], "master", self.bridge)

    def tear_down(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "link", "del", name], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", self.bridge], stderr=subprocess.DEVNULL)


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Hosts that are gone afterwards, whatever happened."""
    network = Hosts(count)
    try:
        network.set_up()
        yield network
    finally:
        network.tear_down()


def missing() -> str | None:
    """Why there can be no hosts here, if so."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    name = f"bb{os.getpid() % 100_000}try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else None


def address(number: int) -> str:
    return f"10.99.0.{number}"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
