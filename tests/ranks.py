"""Run a function on several real processes that form a gloo process group."""

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

TIMEOUT = 60.0


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, *args)`` on ``world`` processes; their results, by rank.

    Function, arguments and results are pickled, so the function stands at the top of its module. The process group is
    initialised, and the variables that torchrun sets are there. An exception in one rank is raised here with its
    traceback, and the other ranks are ended; so is everything that takes longer than a minute. The fork server that
    conftest.py sets up has torch loaded already.
    """
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    waiting: dict[Connection, int] = {}
    processes = []
    results: dict[int, Any] = {}
    try:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(theirs, rank, world, port, function, args), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            waiting[ours] = rank
        end = time.monotonic() + TIMEOUT
        while waiting:
            ready = wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} of {world} took longer than {TIMEOUT:g} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                results[rank] = _receive(connection, rank)
        return [results[rank] for rank in range(world)]
    finally:
        for process in processes:
            if len(results) < world:
                process.terminate()
            process.join()
            process.close()


def _receive(connection: Connection, rank: int) -> Any:
    with connection:
        try:
            status, value = pickle.loads(connection.recv_bytes())
        except EOFError:
            raise RuntimeError(f"rank {rank} died without a word") from None
    if status == "error":
        raise RuntimeError(f"rank {rank}:\n{value}")
    return value


def _main(connection: Connection, rank: int, world: int, port: int, function: Callable[..., Any], args: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
        # Plain pickle copies a tensor's bytes; multiprocessing's leaves them in memory that ends with this process.
        answer = pickle.dumps(("ok", function(rank, *args)))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        answer = pickle.dumps(("error", traceback.format_exc()))
    connection.send_bytes(answer)
    connection.close()
