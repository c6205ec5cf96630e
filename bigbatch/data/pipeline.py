"""What becomes of a batch between its reading and the model, all samples at once, for each kind of data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bigbatch.config.models import Augment, Mask
from bigbatch.spec import Spec

from .augment import augment_images
from .base import Batch
from .mask import Vocabulary, mask_tokens
from .mix import mix_images, partners


class Pipeline:
    """Moves a batch to the device, floats in the run's dtype. Text and images add what they need."""

    def __init__(self, *, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.seed, self.device, self.dtype = seed, device, dtype

    def reach(self, positions: range, window: range) -> tuple[range, Tensor | None]:
        """Positions to read for a batch of ``positions``, and where among them each has its partner, if it has one."""
        return positions, None

    def train(self, batch: Batch, *, index: Tensor, epoch: Tensor, own: slice, partner: Tensor | None) -> Batch:
        """A batch read for training, ``index`` and ``epoch`` int64, on the CPU; ``own`` and ``partner`` are the rows to
        keep and the rows to mix with them."""
        return self._there({**batch, "index": index, "epoch": epoch})

    def evaluate(self, batch: Batch, *, index: Tensor) -> Batch:
        return self._there({**batch, "index": index, "epoch": torch.zeros_like(index)})

    def _there(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}


class PlainPipeline(Pipeline):
    """For data of the user's own."""

    def _there(self, batch: Batch) -> Batch:
        there = super()._there(batch)
        return {name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor for name, tensor in there.items()}


class TextPipeline(Pipeline):
    """Masks rows of tokens, drawn from (seed, epoch, row): ``labels`` come beside ``input_ids``. Those of evaluation
    are masked once and for all, whatever the seed. Without ``mask`` rows stay as they are.
    """

    def __init__(
        self, *, mask: Mask | None, spec: Spec, tokenizer: str, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(seed=seed, device=device, dtype=dtype)
        self.mask = mask
        self.vocabulary = Vocabulary.of(tokenizer, spec, device) if mask else None

    def train(self, batch: Batch, *, index: Tensor, epoch: Tensor, own: slice, partner: Tensor | None) -> Batch:
        there = super().train(batch, index=index, epoch=epoch, own=own, partner=partner)
        return self._masked(there, seed=self.seed, epoch=there["epoch"])

    def evaluate(self, batch: Batch, *, index: Tensor) -> Batch:
        there = super().evaluate(batch, index=index)
        return self._masked(there, seed=0, epoch=there["epoch"] - 1)  # no epoch of a run with seed 0

    def _masked(self, batch: Batch, *, seed: int, epoch: Tensor) -> Batch:
        if self.mask is None or self.vocabulary is None:
            return batch
        tokens, labels = mask_tokens(
            batch["input_ids"],
            config=self.mask,
            vocabulary=self.vocabulary,
            seed=seed,
            epoch=epoch,
            index=batch["index"],
        )
        return {**batch, "input_ids": tokens, "labels": labels}


class ImagePipeline(Pipeline):
    """Augments uint8 images, preprocesses them, (x/255 - mean)/std by default, and mixes them with their partners.

    Raises ValueError if ``data.augment.shift`` could move an image out of its frame.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        augment: Augment,
        preprocess: Callable[[Tensor], Tensor],
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(seed=seed, device=device, dtype=dtype)
        side = min(shape[1:])
        if augment.shift >= side:
            raise ValueError(
                f"data.augment.shift = {augment.shift}: moves images out of sight; choose less than their {side} pixels"
            )
        self.augment, self.preprocess = augment, preprocess

    def reach(self, positions: range, window: range) -> tuple[range, Tensor | None]:
        mixing = self.augment.mixup > 0 or self.augment.cutmix > 0
        return partners(positions, window) if mixing else (positions, None)

    def train(self, batch: Batch, *, index: Tensor, epoch: Tensor, own: slice, partner: Tensor | None) -> Batch:
        image = augment_images(batch["image"], config=self.augment, seed=self.seed, epoch=epoch, index=index)
        image = self._preprocessed(image)
        batch = {**batch, "image": image, "index": index, "epoch": epoch}
        if partner is not None:
            mine = {name: tensor[own] for name, tensor in batch.items()}
            other = image.index_select(0, partner.to(self.device))
            index, epoch = mine["index"], mine["epoch"]
            image, share = mix_images(
                mine["image"], other, config=self.augment, seed=self.seed, epoch=epoch, index=index
            )
            batch = {**mine, "image": image, "label2": batch["label"][partner], "share": share}
        return self._there(batch)

    def evaluate(self, batch: Batch, *, index: Tensor) -> Batch:
        return super().evaluate({**batch, "image": self._preprocessed(batch["image"])}, index=index)

    def _preprocessed(self, image: Tensor) -> Tensor:
        # in float32 at least, so that a half-precision image is rounded once
        work = torch.promote_types(self.dtype, torch.float32)
        return self.preprocess(image.to(self.device, non_blocking=True).to(work))

    def _there(self, batch: Batch) -> Batch:
        return super()._there({**batch, "image": batch["image"].to(self.dtype)})
