"""``bigbatch launch``: a recipe on all processes of one machine or of several.

On each machine `agent.py`, torchrun's agent, starts the workers, and `watchdog.py` starts agents. Restarts are the
watchdog's alone: after any failure, of a worker, of an agent, of another machine, all agents start afresh and find each
other anew. torchrun's own leave out what they cannot see: an agent that waits for a dead connection (a quarter of an
hour, TCP's patience), an agent that was killed, a machine that comes back.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import sys
from collections.abc import Callable, Sequence
from ipaddress import ip_address

import psutil

from bigbatch.cli import OK, PREEMPTED, _positive, make_plan
from bigbatch.config import ConfigError, load_config, say

from .watchdog import Limits, supervise

PORT = 29400
LOCAL = "127.0.0.1:0"
JOIN = 600
"""Seconds in which the machines must have found each other, at the start and after a failure."""
STALL = 300.0
"""Seconds that an agent whose workers are done waits for the others at most (torchrun's limit)."""


def add_to(verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = verb("launch", run, "Train a recipe on all processes of this machine, or of several, and start again.")
    parser.add_argument("--nproc", type=_positive, help="processes on this machine (default: one per GPU, or one)")
    parser.add_argument("--nnodes", default="1", metavar="N|MIN:MAX", help="number of machines (%(default)s)")
    parser.add_argument("--head", metavar="HOST[:PORT]", help=f"the machine where all meet (port {PORT} unless given)")
    parser.add_argument("--max-restarts", type=_count, default=0, help="failures to start again after (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """The verb. Exit codes are train's; 2 also where a recipe cannot run on so many processes."""
    config = load_config(args.config, args.overrides)
    nproc, parts = args.nproc or _devices(), args.nnodes.split(":")
    nodes = [int(part) for part in parts if part.isdecimal()]
    if not 1 <= len(nodes) == len(parts) <= 2 or not 1 <= nodes[0] <= nodes[-1]:
        raise ConfigError(f"--nnodes = {args.nnodes}: give a number of machines, or the least and the most, MIN:MAX")
    if nodes[-1] > 1 and not args.head:
        raise ConfigError(f"--nnodes = {args.nnodes}: several machines meet on one of them; name it, --head HOST:PORT")
    for number in range(nodes[0], nodes[-1] + 1):
        make_plan(config, world_size=number * nproc)
    arguments = ["train", args.config, *args.overrides]
    if nodes[0] == nodes[-1] and config.parallel.expect_world_size is None:
        arguments.append(f"parallel.expect_world_size={nodes[0] * nproc}")
    code = start(
        arguments,
        name=config.run.dir,
        nproc=nproc,
        nodes=(nodes[0], nodes[-1]),
        head=args.head or LOCAL,
        restarts=args.max_restarts,
        limits=Limits(JOIN, min(config.parallel.timeout / 2, STALL), config.run.grace),
    )
    return PREEMPTED if code == OK and _preempted(config.run.dir) else code


def start(
    arguments: Sequence[str], *, name: str, nproc: int, nodes: tuple[int, int], head: str, restarts: int, limits: Limits
) -> int:
    """``bigbatch ARGUMENTS`` in ``nproc`` processes here and on every machine that does the same; the exit code.

    ``nodes`` is the least and the most number of machines, and ``name`` tells apart what meets on one head. Raises
    ConfigError where the head cannot be reached.
    """
    host, _, port = head.partition(":")
    address, listen, interface = _route(host, port)
    defaults: dict[str, object] = {
        "OMP_NUM_THREADS": max(1, len(os.sched_getaffinity(0)) // nproc),
        # An NCCL collective that fails or takes too long ends the process, and not even an abort that hangs delays it.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": 3,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": math.ceil(limits.grace),
        # The store that agents share keeps its first address, whoever joins them later.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": int(nodes[0] < nodes[1]),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
    chosen = {variable: os.environ.get(variable, str(value)) for variable, value in defaults.items() if value}
    say(f"{nproc} processes at {address}; machines: {' to '.join(map(str, sorted(set(nodes))))}, which meet at {host}")
    say(" ".join(f"{variable}={value}" for variable, value in chosen.items()))
    settings: dict[str, object] = {"host": host, "port": int(port or PORT), "listen": listen, "local_addr": address}
    settings |= {"run_id": name, "min_nodes": nodes[0], "max_nodes": nodes[1], "nproc_per_node": nproc}
    settings["parent"] = os.getpid()
    last_call = math.ceil(min(limits.stall / 2, 30))
    settings["rdzv_configs"] = {"is_host": False, "join_timeout": JOIN, "last_call_timeout": last_call}
    command = [sys.executable, "-m", "bigbatch.cli.agent", json.dumps(settings), "-u", "-m", "bigbatch", *arguments]
    return supervise(command, os.environ | chosen, restarts=restarts, limits=limits)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of restarts")
    return int(text)


def _preempted(run: str) -> bool:
    """Whether the workers say so. To list the directory makes NFS forget that the file was not there just now."""
    return os.path.isdir(run) and "preempted.json" in os.listdir(run)


def _devices() -> int:
    """GPUs of this machine, or one."""
    import torch

    return max(1, torch.cuda.device_count())


def _route(head: str, port: str) -> tuple[str, str | None, str | None]:
    """This machine's address on the way to the head, the same where this is the head, and the interface between."""
    try:
        with socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.connect((head, int(port or PORT) or PORT))  # sends nothing
            address, peer = probe.getsockname()[0], probe.getpeername()[0]
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(f"--head = {head}:{port}: cannot be reached ({error}); give HOST or HOST:PORT") from None
    if ip_address(peer).is_loopback and head not in ("localhost", peer):
        raise ConfigError(f"--head = {head}: is {peer} here, where no other machine gets; give its address")
    names = (name for name, found in psutil.net_if_addrs().items() if address in (each.address for each in found))
    return address, address if address == peer else None, next(names, None)
