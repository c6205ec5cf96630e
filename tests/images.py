"""Loaders of image datasets, as a run assembles them."""

from __future__ import annotations

import torch

from bigbatch.data import ImagePipeline, Loader


def image_loader(data, *, stream, augment, seed, device, dtype, **reading):
    work = torch.promote_types(dtype, torch.float32)
    scale, shift = ((t.to(device, work))[:, None, None] for t in (1 / (255 * data.std), -data.mean / data.std))
    pipeline = ImagePipeline(
        shape=data.spec.shape,
        augment=augment,
        preprocess=lambda image: image.mul_(scale).add_(shift),
        seed=seed,
        device=device,
        dtype=dtype,
    )
    return Loader(data, stream=stream, pipeline=pipeline, **reading)
