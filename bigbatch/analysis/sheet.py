"""Training samples, each beside what the model gets of it: a picture, or text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigbatch.data import Batch, ImagePipeline, Loader

ROWS, PAIRS = 6, 4


def contact_sheet(loader: Loader, path: Path) -> None:
    """Write a PNG of the first training samples: read as for evaluation, and as training sees them, before whatever
    preprocessing. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(ROWS * PAIRS, len(loader.dataset.train))
    originals, seen = _batches(loader, range(count))
    figure = Figure(figsize=(2 * PAIRS * 1.3, ROWS * 1.65), layout="constrained")
    axes = figure.subplots(ROWS, 2 * PAIRS, squeeze=False).flatten()
    for place in axes:
        place.axis("off")
    for row in range(count):
        _draw(axes[2 * row], originals["image"][row], _name(loader, originals, row))
        _draw(axes[2 * row + 1], seen["image"][row], f"→ {_name(loader, seen, row)}")
    figure.suptitle("training samples, and what augmentation makes of them")
    FigureCanvasAgg(figure)
    figure.savefig(path)


def rows_of_text(loader: Loader, count: int) -> list[tuple[str, str]]:
    """The first training rows of text, and what the model gets of them."""
    from tokenizers import Tokenizer

    tokenizer, positions = Tokenizer.from_str(loader.dataset.tokenizer), range(min(count, len(loader.dataset.train)))
    index, _ = loader.stream.locate(positions)
    originals = loader.reader.start("train", torch.from_numpy(index))()
    pair = (batch["input_ids"].tolist() for batch in (originals, loader.train(positions)))
    texts = [tokenizer.decode_batch(rows, skip_special_tokens=False) for rows in pair]
    return list(zip(*texts, strict=True))


def _batches(loader: Loader, positions: range) -> tuple[Batch, Batch]:
    """Samples as they are, and augmented and mixed; images uint8 and from 0 to 255."""
    pipeline = loader.pipeline
    assert isinstance(pipeline, ImagePipeline)
    shown = copy.copy(pipeline)
    shown.preprocess = lambda image: image
    loader.pipeline = shown
    try:
        seen = loader.train(positions)
    finally:
        loader.pipeline = pipeline
    # One that cannot be read has no place in an evaluation, so these are what training replaced it with.
    index, epoch = (torch.from_numpy(numbers) for numbers in loader.stream.locate(positions))
    originals = loader.reader.start("train", index)()
    if len(originals["image"]) < len(index):
        originals = loader.reader.start("train", index, epoch)()
    return originals, {name: column.cpu() for name, column in seen.items()}


def _draw(place: Any, image: Tensor, title: str) -> None:
    pixels = image.double().div(255).clamp(0, 1).permute(1, 2, 0)
    if pixels.shape[2] not in (1, 3):
        pixels = pixels[:, :, :1]
    place.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    place.set_title(title, fontsize=7)


def _name(loader: Loader, batch: Batch, row: int) -> str:
    """The label in words; of a mixed sample both, with their shares."""
    names = loader.dataset.spec.names

    def name(column: str) -> str:
        if column not in batch:
            return ""
        label = int(batch[column][row])
        return names[label] if names else str(label)

    if "share" not in batch:
        return name("label")
    share = float(batch["share"][row])
    return f"{share:.0%} {name('label')}, {1 - share:.0%} {name('label2')}"
