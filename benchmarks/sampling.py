"""What the order of samples and keyed randomness cost: the figures in benchmarks/README.md.

    python benchmarks/sampling.py [--steps 7] [--pairs 100]

Fashion-MNIST at batch 4,096 on one process. First the time in which a step learns which samples it sees, as a share of
the step; then, in alternating pairs, a batch with keyed augmentation beside one whose draws come from torch.rand, and
forward and backward passes with keyed dropout beside torch's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from bigbatch.config import load_config
from bigbatch.config.models import Augment
from bigbatch.data import Loader, Stream, augment, mix, size_of
from bigbatch.dist import Runtime
from bigbatch.dropout import KeyedDropout
from bigbatch.keyed import uniform
from bigbatch.plan import resolve
from bigbatch.train import Parts, assemble, train_step
from bigbatch.train.step import my_pieces, shift

RECIPE = Path(__file__).parents[1] / "configs" / "fashion_mnist" / "sgd_4096.yaml"
BATCH = 4096
STREAMS: dict[str, tuple[int | None, int | Literal["all"]]] = {
    "the recipe's": (None, "all"),
    "10⁹ samples": (10**9, "all"),
    "10⁹, data.shuffle 10,000": (10**9, 10_000),
}
AUGMENTS = {
    "flip": Augment(flip=True),
    "shift, flip, erase": Augment(shift=2, flip=True, erase=0.5),
    "mixup": Augment(mixup=0.2),
}


def seconds(work: Callable[..., object], *args: object, **options: object) -> float:
    start = time.perf_counter()
    work(*args, **options)
    return time.perf_counter() - start


def sampling(parts: Parts, steps: int) -> Table:
    """Medians over the steps; of looking up also the mean over three epochs, which has the sorting of each in it."""
    starts = [BATCH * number for number in range(steps + 1)]
    step = statistics.median([seconds(train_step, parts, samples=at) for at in starts][1:])
    title = f"which samples a step sees; the step takes {step:.3f} s"
    table = Table("stream", "median ms", "of a step", "mean ms", "of a step", title=title)
    for name, (count, shuffle) in STREAMS.items():
        size = count or parts.plan.dataset_size
        stream = Stream(size, seed=0, epoch_samples=size, shuffle=shuffle)

        def look_up(at: int, stream: Stream = stream) -> None:
            for piece in my_pieces(parts, at):
                stream.locate(shift(piece, at))

        times = [seconds(look_up, at) for at in range(0, 3 * parts.plan.dataset_size, BATCH)]
        figures = (statistics.median(times), statistics.mean(times))
        table.add_row(name, *(text for t in figures for text in (f"{1000 * t:.2f}", f"{t / step:.2%}")))
    return table


def unkeyed(*keys: int | Tensor, draw: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(*(key.shape for key in (*keys, draw) if isinstance(key, Tensor)))
    return torch.rand(shape, dtype=torch.float64)


def augmentation(parts: Parts, pairs: int) -> Table:
    title = f"a batch of {BATCH}, {pairs} pairs"
    table = Table("augmentation", "keyed ms", "unkeyed ms", "median ratio", "quartiles", title=title)
    whole = parts.loader
    for name, config in AUGMENTS.items():
        loader = Loader(
            whole.dataset, stream=whole.stream, augment=config, seed=0, device=whole.device, dtype=whole.dtype
        )
        times: dict[Callable[..., Tensor], list[float]] = {uniform: [], unkeyed: []}
        for pair in range(-2, pairs):  # the first two warm up
            positions = range(pair % 13 * BATCH, (pair % 13 + 1) * BATCH)
            for draws in sorted(times, key=lambda one: (one is uniform) == (pair % 2 == 0)):  # each comes first in turn
                augment.uniform = mix.uniform = draws  # type: ignore[attr-defined]
                took = seconds(loader.train, positions)
                if pair >= 0:
                    times[draws].append(took)
        augment.uniform = mix.uniform = uniform  # type: ignore[attr-defined]
        keyed, free = times.values()
        low, ratio, high = statistics.quantiles([a / b for a, b in zip(keyed, free, strict=True)], n=4)
        medians = (f"{1000 * statistics.median(values):.1f}" for values in (keyed, free))
        table.add_row(name, *medians, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}")
    return table


def dropout(pairs: int) -> Table:
    title = f"forward and backward passes, {pairs} pairs"
    table = Table("dropout", "keyed ms", "torch ms", "median ratio", "quartiles", title=title)
    x = torch.rand(32, 197, 192, requires_grad=True)
    rates: dict[str, Any] = {"img_size": 32, "patch_size": 4, "drop_path_rate": 0.1, "proj_drop_rate": 0.1}
    models = {
        "F.dropout of 32 × 197 × 192": (lambda: F.dropout(x, 0.1).sum().backward(), 32),
        "ViT-tiny, 16 images, 65 tokens, paths and projections": (_passes(**rates), 16),
        "the same, and attention": (_passes(**rates, attn_drop_rate=0.1), 16),
    }
    for name, (work, samples) in models.items():
        keyed = KeyedDropout(0)
        times: dict[bool, list[float]] = {True: [], False: []}
        for pair in range(-2, pairs):
            window = range((pair + 2) * samples, (pair + 3) * samples)
            for own in (pair % 2 == 0, pair % 2 != 0):
                with keyed.at(window, window) if own else nullcontext():
                    took = seconds(work)
                if pair >= 0:
                    times[own].append(took)
        low, ratio, high = statistics.quantiles([a / b for a, b in zip(*times.values(), strict=True)], n=4)
        medians = (f"{1000 * statistics.median(values):.1f}" for values in times.values())
        table.add_row(name, *medians, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}")
    return table


def _passes(**options: Any) -> Callable[[], None]:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)
    images = torch.rand(16, 3, 32, 32)
    return lambda: model(images).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small, and a share of a step is then that of a core
    config = load_config(RECIPE)
    plan = resolve(config, world_size=1, dataset_size=size_of(config.data))
    with Runtime() as runtime:
        parts = assemble(config, plan, runtime)
        for table in (sampling(parts, args.steps), augmentation(parts, args.pairs), dropout(args.pairs // 4)):
            Console().print(table)


if __name__ == "__main__":
    main()
