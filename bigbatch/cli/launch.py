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
from pathlib import Path
from typing import Any

import psutil

from bigbatch.cli import OK, PREEMPTED, _positive, make_plan
from bigbatch.config import ConfigError, load_config

from .watchdog import say, supervise

PORT = 29400
JOIN = 600
"""Seconds in which the machines must have found each other, at the start and after a failure."""
STALL = 300.0
"""Seconds that an agent whose workers are done waits for the others at most (torchrun's limit)."""


def add_to(verb: Callable[..., argparse.ArgumentParser]) -> None:
    parser = verb("launch", run, "Train a recipe on all processes of this machine, or of several, and start again.")
    parser.set_defaults(is_launcher=True)
    parser.add_argument("--nproc", type=_positive, help="processes on this machine (default: one per GPU, or one)")
    parser.add_argument("--nnodes", type=_nodes, default=(1, 1), metavar="N|MIN:MAX", help="machines (default: 1)")
    parser.add_argument(
        "--head", type=_endpoint, metavar="HOST[:PORT]", help=f"the machine where all meet (port {PORT} unless given)"
    )
    parser.add_argument("--max-restarts", type=int, default=0, help="failures after which to go on (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """The verb. Exit codes are train's, 75 included; 2 also where a recipe cannot run on so many processes."""
    config = load_config(args.config, args.overrides)
    nproc, (least, most) = args.nproc or devices(), args.nnodes
    if most > 1 and not args.head:
        raise ConfigError(f"--nnodes = {least}:{most}: several machines meet on one of them; name it, --head HOST:PORT")
    for nodes in range(least, most + 1):
        make_plan(config, world_size=nodes * nproc)
    overrides = list(args.overrides)
    if least == most and config.parallel.expect_world_size is None:
        overrides.append(f"parallel.expect_world_size={most * nproc}")
    preempted = Path(config.run.dir, "preempted.json")
    before = _stamp(preempted)
    code = start(
        ["train", args.config, *overrides],
        name=config.run.dir,
        nproc=nproc,
        nnodes=args.nnodes,
        head=args.head or ("127.0.0.1", 0),
        restarts=args.max_restarts,
        timeout=config.parallel.timeout,
        grace=config.run.grace,
    )
    return PREEMPTED if code == OK and _stamp(preempted) not in (None, before) else code


def start(
    arguments: Sequence[str],
    *,
    name: str,
    nproc: int,
    nnodes: tuple[int, int] = (1, 1),
    head: tuple[str, int] = ("127.0.0.1", 0),
    restarts: int = 0,
    timeout: float,
    grace: float,
) -> int:
    """``bigbatch ARGUMENTS`` in ``nproc`` processes here and on every machine that does the same; the exit code.

    ``name`` keeps apart what meets on one head. ``timeout`` and ``grace`` are ``parallel.timeout`` and ``run.grace``.
    ConfigError where the head cannot be reached.
    """
    least, most = nnodes
    host, port = head
    address, listen, interface = _route(host, port)
    stall = min(timeout / 2, STALL)
    environment: dict[str, object] = {
        "OMP_NUM_THREADS": max(1, len(os.sched_getaffinity(0)) // nproc),
        # An NCCL collective that fails or takes too long ends the process; not even an abort that hangs holds it up,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": 3,
        # and neither does a watchdog thread that does.
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": math.ceil(max(60, min(timeout, 480))),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": math.ceil(grace),
    }
    if interface:
        environment |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    if least < most:
        # The agents' shared store would still have the address of the first round when another machine joins.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = 1
    chosen = {variable: os.environ.get(variable, str(value)) for variable, value in environment.items()}
    machines = f"{least} machines" if least == most else f"{least} to {most} machines"
    say(f"{nproc} processes on each of {machines}, head {host}, this one {address}")
    say(" ".join(f"{variable}={value}" for variable, value in chosen.items()))
    settings: dict[str, Any] = {
        "min_nodes": least,
        "max_nodes": most,
        "nproc_per_node": nproc,
        "run_id": name,
        "max_restarts": 0,
        "local_addr": address,
        "rdzv_backend": "c10d",
        "rdzv_configs": {
            "is_host": False,
            "join_timeout": JOIN,
            "last_call_timeout": math.ceil(min(stall / 2, 30)),
        },
        "host": host,
        "port": port,
        "listen": listen,
    }
    return supervise(
        [sys.executable, "-m", "bigbatch.cli.agent", json.dumps(settings), "-u", "-m", "bigbatch", *arguments],
        environment=os.environ | chosen,
        restarts=restarts,
        join=JOIN,
        stall=stall,
        grace=grace,
    )


def devices() -> int:
    """GPUs of this machine, or one."""
    import torch

    return max(1, torch.cuda.device_count())


def _route(host: str, port: int) -> tuple[str, str | None, str | None]:
    """This machine's address as the head sees it, the head's own where this is the head, and the interface between."""
    try:
        family, kind, *_, destination = socket.getaddrinfo(host, port or PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(destination)  # sends nothing
            address, peer = probe.getsockname()[0], probe.getpeername()[0]
    except OSError as error:
        raise ConfigError(f"--head = {host}: cannot be reached ({error}); name a machine of the run") from None
    if ip_address(peer).is_loopback and host not in ("localhost", peer):
        raise ConfigError(f"--head = {host}: is {peer} here, where no other machine gets; give its address")
    names = (name for name, found in psutil.net_if_addrs().items() if address in (each.address for each in found))
    return address, peer if peer == address else None, next(names, None)


def _nodes(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    if not least.isdecimal() or not (most or least).isdecimal() or not 1 <= int(least) <= int(most or least):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of machines nor MIN:MAX")
    return int(least), int(most or least)


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.partition(":")
    if not host or not (port or "1").isdecimal() or not 0 < int(port or 1) < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not HOST or HOST:PORT")
    return host, int(port or PORT)


def _stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None
