"""Real processes on this machine that form a gloo process group, for one function call."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ("torch", "torch.distributed", "torch._dynamo", "accelerate")  # torch's optimisers import dynamo


class RankError(RuntimeError):
    """One process failed; the message names its rank and holds its traceback, ``__cause__`` its exception."""


def run_processes(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float, limit: float | None = None
) -> list[Any]:
    """``function(rank, *args)`` in ``world_size`` new processes on the CPU; their results, by rank.

    Function, arguments and results are pickled, so the function stands at the top of its module. The variables that
    torchrun sets are there, beside those of this process, and the cores are shared out. An exception in one rank is
    raised here as RankError and ends the others; so does, as TimeoutError, a call that takes longer than ``limit``
    seconds (a collective: ``timeout``). Starts from a fork server that has torch loaded, where one process takes a
    tenth of a second.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    waiting: dict[Connection, int] = {}
    processes = []
    results: dict[int, Any] = {}
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            job = (theirs, rank, world_size, port, timeout, dict(os.environ), function, args)
            process = context.Process(target=_main, args=job)  # no daemon: it may have children that read data
            process.start()
            theirs.close()
            processes.append(process)
            waiting[ours] = rank
        start = time.monotonic()
        while waiting:
            left = None if limit is None else max(0.0, start + limit - time.monotonic())
            ready = wait(waiting, timeout=left)
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} of {world_size} took longer than {limit:g} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                results[rank] = _receive(connection, rank)
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            if len(results) < world_size:
                process.terminate()
            process.join()
            process.close()


def _receive(connection: Connection, rank: int) -> Any:
    with connection:
        try:
            failed, value, error = pickle.loads(connection.recv_bytes())
        except EOFError:
            raise RankError(f"rank {rank} died without a word (out of memory?)") from None
    if failed:
        raise RankError(f"rank {rank}:\n{value}") from error
    return value


def _main(
    connection: Connection,
    rank: int,
    world_size: int,
    port: int,
    timeout: float,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    threads = max(1, torch.get_num_threads() // world_size)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in world.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        # Plain pickle copies a tensor's bytes; multiprocessing's leaves them in memory that ends with this process.
        answer = pickle.dumps((False, function(rank, *args), None))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException as error:
        answer = pickle.dumps((True, traceback.format_exc(), portable(error)))
    connection.send_bytes(answer)
    connection.close()


def portable(error: BaseException) -> BaseException | None:
    """The exception, if it survives pickling."""
    try:
        return pickle.loads(pickle.dumps(error))  # type: ignore[no-any-return]
    except Exception:
        return None
