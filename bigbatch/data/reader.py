"""Reading samples: here and now, or ahead of their use in processes that do nothing else."""

from __future__ import annotations

import multiprocessing
import pickle
import resource
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from multiprocessing import forkserver, resource_tracker
from multiprocessing.util import Finalize

import torch
from torch import Tensor

from bigbatch.signals import end_with_owner

from .base import SPLITS, Batch, DataError, Dataset, Part, Split

Problems = dict[str, str]
"""What was unreadable, by name, and why."""

Job = tuple[Split, Tensor, Tensor | None]
Read = tuple[Batch, Problems]
Begun = tuple[ProcessPoolExecutor, list[Future[Read]]]

ATTEMPTS = 3
"""Times that a worker may die over the same samples."""

STOPS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to stop, which SLURM sends to all of its processes."""

_parts: dict[Split, Part] = {}  # of a process that reads


class Reader:
    """Reads a dataset's parts in this process, or in ``workers`` others, which end with it.

    ``problems`` are the samples that were not readable and were passed over so far, by name. Raises `DataError` where
    a sample cannot be read, or where workers die over it again and again; one that dies is replaced.
    """

    def __init__(self, dataset: Dataset, *, workers: int, pin: bool) -> None:
        self.problems: Problems = {}
        self._dataset, self._workers, self._pin = dataset, workers, pin
        self._pool: ProcessPoolExecutor | None = None

    def start(self, split: Split, index: Tensor, epoch: Tensor | None = None) -> Callable[[], Batch]:
        """Begin to read; what it returns waits for the samples. Without workers they are read then."""
        if not self._workers:
            return lambda: self._note([_read(self._dataset.part(split), index, epoch)])
        cuts = [len(index) * i // self._workers for i in range(self._workers + 1)]
        pieces = [slice(low, high) for low, high in pairwise(cuts) if low < high]
        jobs = [(split, index[piece], None if epoch is None else epoch[piece]) for piece in pieces]
        begun = self._submit(jobs)
        return lambda: self._note(self._wait(jobs, begun))

    def close(self) -> None:
        """End the processes; what they were about to read is forgotten."""
        if self._pool:
            self._end()
            self._pool = None

    def _submit(self, jobs: list[Job]) -> Begun:
        for _ in range(ATTEMPTS):
            pool = self._pool = self._pool or self._processes()
            try:
                return pool, [pool.submit(_work, *job) for job in jobs]
            except BrokenProcessPool:
                self.close()
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                raise DataError(
                    f"data.workers = {self._workers}: the parts of the dataset cannot be sent to them ({error}); have "
                    "their classes at the top of a module and in them nothing but data, or set data.workers=0"
                ) from error
        raise _died(jobs)

    def _wait(self, jobs: list[Job], begun: Begun) -> list[Read]:
        for _ in range(ATTEMPTS):
            pool, futures = begun
            try:
                return [future.result() for future in futures]
            except BrokenProcessPool:
                if pool is self._pool:
                    self.close()
                begun = self._submit(jobs)
        raise _died(jobs)

    def _processes(self) -> ProcessPoolExecutor:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each tensor read ahead is an open file here
        context = multiprocessing.get_context("forkserver")
        parts = {split: self._dataset.part(split) for split in SPLITS}
        modules = {type(part).__module__ for part in parts.values()}
        # Imported once and shared: torchvision alone takes more than a second and 100 MB.
        context.set_forkserver_preload([__name__, *sorted(m for m in modules if m.startswith("bigbatch."))])
        # What processes start from, and they until they have begun, must outlive what only asks the run to stop.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            for start in (resource_tracker.ensure_running, forkserver.ensure_running):
                signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # once more, since the first one lets SIGTERM through
                start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        pool = ProcessPoolExecutor(self._workers, mp_context=context, initializer=_begin, initargs=(parts,))
        # Waits, and before multiprocessing closes the queues: else what tells workers to end could come too late.
        self._end = Finalize(self, pool.shutdown, kwargs={"cancel_futures": True}, exitpriority=100)
        return pool

    def _note(self, found: list[Read]) -> Batch:
        for _, problems in found:
            self.problems |= problems
        batches = [batch for batch, _ in found]
        batch = batches[0] if len(batches) == 1 else {n: torch.cat([b[n] for b in batches]) for n in batches[0]}
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin else batch


def _died(jobs: list[Job]) -> DataError:
    _, index, _ = jobs[0]
    return DataError(
        f"processes that read data die over the {sum(len(job[1]) for job in jobs)} samples from number {int(index[0])} "
        "on (out of memory?): lower data.workers or data.prefetch, or find the sample with data.workers=0"
    )


def _begin(parts: dict[Split, Part]) -> None:
    """Make this process one that reads: it ends when its owner has, and signals that ask a run to stop are its owner's
    to answer (SIGTERM is how the pool ends it; of one from elsewhere the owner sees a worker die)."""
    _parts.update(parts)
    torch.set_num_threads(1)
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    end_with_owner()


def _work(split: Split, index: Tensor, epoch: Tensor | None) -> Read:
    return _read(_parts[split], index, epoch)


def _read(part: Part, index: Tensor, epoch: Tensor | None) -> Read:
    batch = part.gather(index, epoch)
    problems: Problems = getattr(part, "problems", {})
    found = dict(problems)
    problems.clear()
    return batch, found
