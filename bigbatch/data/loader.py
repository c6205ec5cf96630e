"""From positions in the stream of samples to batches on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .base import Batch, Dataset, Split
from .pipeline import Pipeline
from .reader import Reader
from .sampler import Stream

Request = tuple[range, range]
"""Positions of a batch, and of the window that it is a piece of."""


class Loader:
    """Batches of a dataset on the device: the dataset's columns, as ``pipeline`` leaves them, and ``index`` and
    ``epoch``, int64 (B,). Of images, ``image`` (B, C, H, W) and ``label`` int64 (B,); where training images are mixed,
    ``label2``, the partner's label, int64 (B,), and ``share``, the weight of ``label`` beside it, float (B,).

    ``prefetch`` batches are read ahead of their use, as far as `follow` tells which they are.
    """

    def __init__(
        self, dataset: Dataset, *, stream: Stream, pipeline: Pipeline, workers: int = 0, prefetch: int = 2
    ) -> None:
        self.dataset, self.stream, self.pipeline = dataset, stream, pipeline
        self.reader = Reader(dataset, workers=workers, pin=pipeline.device.type == "cuda")
        self._ahead = prefetch if workers else 0
        self._coming: Iterator[Request] = iter(())
        self._begun: deque[tuple[Request, Callable[[], Batch]]] = deque()

    def follow(self, requests: Iterator[Request]) -> None:
        """Positions and window of every call of `train` to come, in order. Others may come between."""
        self._coming = requests
        self._begun.clear()

    def train(self, positions: range, *, window: range | None = None) -> Batch:
        """The samples at ``positions`` of the stream, as training sees them.

        Partners to mix with are found in ``window``, the positions of the whole step; default: ``positions``. One that
        is not in ``positions`` is read here too, so that nothing has to be sent.

        An empty range gives one sample, the part's first, for a process that must take part and counts for nothing:
        weigh it with zero.
        """
        window = window or positions
        near, partner = self.pipeline.reach(positions, window)
        index, epoch = self._locate(near)
        first = positions.start - near.start
        own = slice(first, first + max(len(positions), 1))
        batch = self._read((positions, window))
        return self.pipeline.train(batch, index=index, epoch=epoch, own=own, partner=partner)

    def evaluate(
        self, split: Split, *, rank: int, world_size: int, batch: int, chosen: Tensor | None = None
    ) -> Iterator[Batch]:
        """This rank's share of a part as it is, ``batch`` samples at a time: over the ranks every sample once, or each
        of those ``chosen``, int64.

        Shares differ by at most one sample, so a rank may have a batch more than another, or none. ``epoch`` is 0.
        Samples that cannot be read are left out, and so is a batch of nothing else.
        """
        size = len(self.dataset.part(split)) if chosen is None else len(chosen)
        start, stop = (size * r // world_size for r in (rank, rank + 1))
        begun: deque[tuple[Tensor, Callable[[], Batch]]] = deque()
        for low in range(start, stop, batch):
            index = torch.arange(low, min(low + batch, stop))
            index = index if chosen is None else chosen[index]
            begun.append((index, self.reader.start(split, index)))
            if len(begun) > self._ahead:
                yield from self._evaluated(*begun.popleft())
        for index, read in begun:
            yield from self._evaluated(index, read)

    def rounds(self, split: Split, *, world_size: int, batch: int) -> int:
        """The most batches that any rank has to `evaluate`."""
        return -(-len(self.dataset.part(split)) // (world_size * batch))

    def close(self) -> None:
        """End the processes that read."""
        self._begun.clear()
        self.reader.close()

    def _read(self, request: Request) -> Batch:
        while len(self._begun) <= self._ahead and (coming := next(self._coming, None)):
            self._begun.append((coming, self._start(coming)))
        if self._begun and self._begun[0][0] == request:
            return self._begun.popleft()[1]()
        return self._start(request)()

    def _start(self, request: Request) -> Callable[[], Batch]:
        near, _ = self.pipeline.reach(*request)
        return self.reader.start("train", *self._locate(near))

    def _locate(self, near: range) -> tuple[Tensor, Tensor]:
        if not near:
            return torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        index, epoch = self.stream.locate(near)
        return torch.from_numpy(index), torch.from_numpy(epoch)

    def _evaluated(self, index: Tensor, read: Callable[[], Batch]) -> Iterator[Batch]:
        batch = read()
        index = batch.pop("index", index)
        if len(index):
            yield self.pipeline.evaluate(batch, index=index)
