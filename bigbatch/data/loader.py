"""From positions in the stream of samples to batches on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from bigbatch.config.models import Augment

from .augment import augment_images
from .mix import mix_images, partners
from .sampler import Stream
from .sources import Dataset, Part

Batch = dict[str, Tensor]


class Loader:
    """Batches of a dataset: ``image`` (B, C, H, W) of ``dtype``, (x/255 - mean)/std; ``label``, ``index`` and ``epoch``
    int64 (B,). All on ``device``. Where training images are mixed, ``label2``, the partner's label, int64 (B,), and
    ``share``, the weight of ``label`` beside it, float (B,).

    Raises ValueError if ``data.augment.shift`` could move an image out of its frame.
    """

    def __init__(
        self, dataset: Dataset, *, stream: Stream, augment: Augment, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        side = min(dataset.shape[1:])
        if augment.shift >= side:
            raise ValueError(
                f"data.augment.shift = {augment.shift}: moves images out of sight; choose less than their {side} pixels"
            )
        self.dataset, self.stream, self.augment, self.seed = dataset, stream, augment, seed
        self.device, self.dtype = device, dtype
        # in float32 at least, so that a half-precision image is rounded once
        self._work = torch.promote_types(dtype, torch.float32)
        scale, shift = 1 / (255 * dataset.std), -dataset.mean / dataset.std
        self._scale, self._shift = (t.to(device, self._work)[:, None, None] for t in (scale, shift))

    def train(self, positions: range, *, window: range | None = None) -> Batch:
        """The samples at ``positions`` of the stream, augmented.

        Partners to mix with are found in ``window``, the positions of the whole step; default: ``positions``. One that
        is not in ``positions`` is loaded and augmented here too, so that nothing has to be sent.

        An empty range gives one sample, the part's first, for a process that must take part and counts for nothing:
        weigh it with zero.
        """
        mixing = self.augment.mixup > 0 or self.augment.cutmix > 0
        near, partner = partners(positions, window or positions) if mixing else (positions, None)
        if near:
            index, epoch = (torch.from_numpy(array) for array in self.stream.locate(near))
        else:
            index = epoch = torch.zeros(1, dtype=torch.int64)
        image, label = self.dataset.train.gather(index)
        image = augment_images(image, config=self.augment, seed=self.seed, epoch=epoch, index=index)
        image = self._normalised(image)
        if partner is None:
            return self._batch(image, label, index, epoch)
        first = positions.start - near.start
        own = slice(first, first + len(partner))
        index, epoch = index[own], epoch[own]
        other = image.index_select(0, partner.to(self.device))
        image, share = mix_images(image[own], other, config=self.augment, seed=self.seed, epoch=epoch, index=index)
        return self._batch(image, label[own], index, epoch, label2=label[partner], share=share)

    def evaluate(
        self, part: Literal["train", "validation", "test"], *, rank: int, world_size: int, batch: int
    ) -> Iterator[Batch]:
        """This rank's share of ``part`` as it is, ``batch`` samples at a time: over the ranks every sample once.

        Shares differ by at most one sample, so a rank may have a batch more than another, or none. ``epoch`` is 0.
        """
        data: Part = getattr(self.dataset, part)
        start, stop = (len(data) * r // world_size for r in (rank, rank + 1))
        for low in range(start, stop, batch):
            index = torch.arange(low, min(low + batch, stop))
            image, label = data.gather(index)
            yield self._batch(self._normalised(image), label, index, torch.zeros_like(index))

    def rounds(self, part: Literal["train", "validation", "test"], *, world_size: int, batch: int) -> int:
        """The most batches that any rank has to `evaluate`."""
        data: Part = getattr(self.dataset, part)
        return -(-len(data) // (world_size * batch))

    def _normalised(self, image: Tensor) -> Tensor:
        return image.to(self.device, non_blocking=True).to(self._work).mul_(self._scale).add_(self._shift)

    def _batch(self, image: Tensor, label: Tensor, index: Tensor, epoch: Tensor, **more: Tensor) -> Batch:
        parts = {"image": image.to(self.dtype), "label": label, "index": index, "epoch": epoch, **more}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in parts.items()}
