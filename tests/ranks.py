"""Run a test's functions on several real processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

from bigbatch.dist import run_processes

LIMIT = 180.0


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`run_processes` for a test, which may take three minutes."""
    return run_processes(world, function, *args, timeout=LIMIT, limit=LIMIT)


class Ranks:
    """Processes that stay for many calls, so that a property test need not start them for every example."""

    def __init__(self, world: int) -> None:
        pairs = [multiprocessing.get_context("forkserver").Pipe() for _ in range(world)]
        self._ours = [ours for ours, _ in pairs]
        job = (world, _serve, [theirs for _, theirs in pairs])
        self._thread = Thread(target=run_processes, args=job, kwargs={"timeout": LIMIT})
        self._thread.start()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(rank, *args)`` on every process; their results, by rank."""
        for connection in self._ours:
            connection.send((function, args))
        answers = [connection.recv() for connection in self._ours]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def close(self) -> None:
        for connection in self._ours:
            connection.send(None)
        self._thread.join()


def _serve(rank: int, connections: list[Connection]) -> None:
    while (job := connections[rank].recv()) is not None:
        function, args = job
        try:
            answer = function(rank, *args)
        except Exception as error:
            answer = error
        connections[rank].send(answer)
