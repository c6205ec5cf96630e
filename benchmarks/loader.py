"""Images a second that reach a training loop, beside torchvision and timm: the figures in benchmarks/README.md.

    OMP_NUM_THREADS=1 python benchmarks/loader.py [--cases 224x224 500x375 memory] [--images 5120] [--rounds 7]
        [--workers 2] [--batch 256] [--fashion-mnist FOLDER] [--chart PATH]

Fashion-MNIST is written out as RGB JPEGs of 224 × 224 and of 500 × 375 pixels, with noise added, for the scaled images
alone would compress to a few kilobytes. Every contender crops at random to 224 × 224 (RandomResizedCrop), flips, and
hands over normalised float32 batches: torchvision's ImageFolder with its transforms of PIL images in a DataLoader,
timm's create_loader, whose PrefetchLoader normalises whole batches, and bigbatch. Then 28 × 28 images from memory at
batch 4,096, beside a DataLoader over a TensorDataset that is normalised batch by batch. In each round every contender
goes through all images once, in turn; a first round warms up. From memory it is ten times as many rounds. Besides the
wall's clock there is that of all processes of a contender together, which stands while others run: fit for a busy
machine, and on one where workers keep every core busy the same comparison.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import psutil
import torch
from matplotlib import pyplot
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data import create_loader
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from bigbatch.config.models import Augment, Folder, Idx
from bigbatch.data import Dataset, ImagePipeline, Loader, MemoryPart, Stream, load_data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {"224x224": (224, 224), "500x375": (500, 375)}
IN_MEMORY, MEMORY_BATCH = "memory", 4096
Contender = Callable[[], Iterable[object]]
Rates = dict[str, list[float]]


def write_images(folder: Path, source: MemoryPart, *, size: tuple[int, int], count: int) -> None:
    rng = np.random.default_rng(0)
    for k in range(10):
        (folder / "train" / str(k)).mkdir(parents=True)
        (folder / "val" / str(k)).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(source.images[: count + 1], source.labels.tolist(), strict=False)):
        scaled = Image.fromarray(image[0].numpy()).resize(size, Image.Resampling.BICUBIC)
        noise = rng.integers(-12, 13, (size[1], size[0], 3))
        pixels = (np.asarray(scaled, dtype=np.int64)[..., None] + noise).clip(0, 255).astype(np.uint8)
        part = "train" if i < count else "val"
        Image.fromarray(pixels).save(folder / part / str(label) / f"{i}.jpg", quality=90)


def bigbatch_loader(dataset: Dataset, *, mean: Tensor, std: Tensor, workers: int) -> Loader:
    scale, shift = (t.float()[:, None, None] for t in (1 / (255 * std), -mean / std))
    size = len(dataset.train)
    pipeline = ImagePipeline(
        shape=dataset.spec.shape,
        augment=Augment(),
        preprocess=lambda image: image.mul_(scale).add_(shift),
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    return Loader(
        dataset, stream=Stream(size, seed=0, epoch_samples=size), pipeline=pipeline, workers=workers, prefetch=2
    )


def epochs_of(loader: Loader, batch: int) -> Contender:
    """What passes over the dataset once, dropping a last batch that is short."""
    size = len(loader.dataset.train)
    epochs = iter(range(2**30))

    def epoch() -> Iterator[object]:
        first = next(epochs) * size
        pieces = [range(first + at, first + at + batch) for at in range(0, size - batch + 1, batch)]
        loader.follow((piece, piece) for piece in pieces)
        for piece in pieces:
            yield loader.train(piece)

    return epoch


def from_files(folder: Path, workers: int, batch: int) -> dict[str, Contender]:
    steps = ({"RandomResizedCrop": {"size": 224}}, "RandomHorizontalFlip")
    dataset = load_data(Folder(name="folder", path=str(folder), transforms=steps), seed=0)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    usual = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    reading = {"batch_size": batch, "num_workers": workers, "persistent_workers": True}
    torchvision_loader = DataLoader(
        ImageFolder(str(folder / "train"), usual), shuffle=True, drop_last=True, prefetch_factor=2, **reading
    )
    timm_loader = create_loader(
        ImageFolder(str(folder / "train")),
        input_size=224,
        is_training=True,
        color_jitter=0.0,
        mean=MEAN,
        std=STD,
        device=torch.device("cpu"),
        **reading,
    )
    ours = bigbatch_loader(dataset, mean=mean, std=std, workers=workers)
    return {
        "bigbatch": epochs_of(ours, batch),
        "timm": lambda: timm_loader,
        "torchvision": lambda: torchvision_loader,
    }


def from_memory(dataset: Dataset, *, workers: int) -> dict[str, Contender]:
    assert isinstance(dataset.train, MemoryPart) and dataset.mean is not None and dataset.std is not None
    images, labels, mean, std = dataset.train.images, dataset.train.labels, dataset.mean, dataset.std
    scale, shift = (t.float()[:, None, None] for t in (1 / (255 * std), -mean / std))

    def peer(workers: int) -> Contender:
        loader = DataLoader(
            TensorDataset(images, labels),
            batch_size=MEMORY_BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        return lambda: ((image.float().mul_(scale).add_(shift), label) for image, label in loader)

    return {
        "bigbatch": epochs_of(bigbatch_loader(dataset, mean=mean, std=std, workers=0), MEMORY_BATCH),
        "TensorDataset": peer(0),
        f"TensorDataset, {workers} workers": peer(workers),
    }


def cpu_seconds() -> float:
    """Of this process and all that it has started."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measure(contenders: dict[str, Contender], *, images: int, rounds: int) -> tuple[Rates, Rates]:
    """Images a second of each contender in each round, by the wall's clock and by that of all its processes."""
    by_wall: Rates = defaultdict(list)
    by_cpu: Rates = defaultdict(list)
    for turn in range(-1, rounds):
        names = list(contenders)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, cpu = time.perf_counter(), cpu_seconds()
            for _ in contenders[name]():
                pass
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            if turn >= 0:
                by_wall[name].append(images / wall)
                by_cpu[name].append(images / cpu)
    return by_wall, by_cpu


def table_of(title: str, by_wall: Rates, by_cpu: Rates) -> Table:
    clocks = {"second": by_wall, "CPU second": by_cpu}
    columns = [c for clock in clocks for c in (f"images/{clock}", "bigbatch ÷ it", "quartiles")]
    table = Table("loader", *columns, title=title)
    for name in by_wall:
        cells = []
        for rates in clocks.values():
            ratios = [a / b for a, b in zip(rates["bigbatch"], rates[name], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells += [f"{statistics.median(rates[name]):,.0f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        table.add_row(name, *cells)
    return table


def draw(results: dict[str, Rates], path: Path) -> None:
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(
        1, len(results), squeeze=False, figsize=(4.6 * len(results), 2.6), layout="constrained"
    )
    colours = {"bigbatch": "#1f77b4", "timm": "#ff7f0e"}
    for axis, (title, rates) in zip(axes[0], results.items(), strict=True):
        quartiles = [statistics.quantiles(values, n=4) for values in rates.values()]
        spread = [[q[1] - q[0] for q in quartiles], [q[2] - q[1] for q in quartiles]]
        bars = axis.barh(
            list(rates),
            [q[1] for q in quartiles],
            xerr=spread,
            color=[colours.get(name, "#7f7f7f") for name in rates],
            error_kw={"lw": 1, "capsize": 2},
        )
        axis.bar_label(bars, [f"{q[1]:,.0f}" for q in quartiles], label_type="center", color="white")
        axis.set(title=title, xlabel="images per CPU second, all processes")
        axis.invert_yaxis()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*SIZES, IN_MEMORY]
    parser.add_argument("--cases", nargs="+", choices=known, default=known)
    parser.add_argument("--images", type=int, default=5120)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--fashion-mnist", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory = load_data(Idx(name="idx", path=args.fashion_mnist), seed=0)
    assert isinstance(memory.train, MemoryPart)
    results = {}
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            if case == IN_MEMORY:
                contenders, size, batch = from_memory(memory, workers=args.workers), len(memory.train), MEMORY_BATCH
            else:
                write_images(Path(folder), memory.train, size=SIZES[case], count=args.images)
                contenders, size, batch = from_files(Path(folder), args.workers, args.batch), args.images, args.batch
            rounds = args.rounds * (10 if case == IN_MEMORY else 1)
            title = f"{case}, {args.workers} workers, batch {batch:,}"
            results[title] = measure(contenders, images=size // batch * batch, rounds=rounds)
            Console().print(table_of(title, *results[title]))
            del contenders  # and its processes
    if args.chart:
        draw({title: by_cpu for title, (_, by_cpu) in results.items()}, args.chart)


if __name__ == "__main__":
    main()
