"""What one step of LARS and LAMB costs on the CPU, beside other libraries' and torch's fused SGD and AdamW.

    python benchmarks/optimizer_step.py [--shapes resnet50 vit_b bert_large] [--rounds 15] [--threads 2] [--chart PATH]

float32, every layer adapted (by pytorch_optimizer's LARS, matrices only), in interleaved rounds: each round steps every
optimiser once, so that what else the machine does hits all alike. timm's Lamb clips the gradient's norm unless told not
to. Gradients that a step has written to are restored between the clocks. The optimisers of a family share weights,
gradients and state, so that BERT-large fits in 8 GB. The yardstick is the time of an addition in place that moves as
many bytes as an update must: weights, gradients and state in, weights and state out. With one thread the clock is that
of the process, which stands while others run: fit for a busy machine. With more it is the wall's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytorch_optimizer
import timm
import timm.optim
import torch
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bigbatch.optim import LAMB, LARS

FAMILIES: dict[str, dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]] = {
    "LARS": {
        "torch SGD, fused": lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9, weight_decay=1e-4, fused=True),
        "bigbatch LARS": lambda p: LARS(p, 1e-4, weight_decay=1e-4),
        "bigbatch LARS, Nesterov": lambda p: LARS(p, 1e-4, weight_decay=1e-4, nesterov=True),
        "bigbatch LARS, foreach": lambda p: LARS(p, 1e-4, weight_decay=1e-4, kernel="foreach"),
        "timm Lars": lambda p: timm.optim.Lars(p, 1e-4, momentum=0.9, weight_decay=1e-4),
        "pytorch_optimizer LARS": lambda p: pytorch_optimizer.LARS(p, 1e-4, weight_decay=1e-4),
    },
    "LAMB": {
        "torch AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-5, weight_decay=1e-4, fused=True),
        "bigbatch LAMB": lambda p: LAMB(p, 1e-5, weight_decay=1e-4),
        "bigbatch LAMB, foreach": lambda p: LAMB(p, 1e-5, weight_decay=1e-4, kernel="foreach"),
        "timm Lamb": lambda p: timm.optim.Lamb(p, 1e-5, weight_decay=1e-4),
        "timm Lamb, no clipping": lambda p: timm.optim.Lamb(p, 1e-5, weight_decay=1e-4, max_grad_norm=None),
        "pytorch_optimizer Lamb": lambda p: pytorch_optimizer.Lamb(p, 1e-5, weight_decay=1e-4),
    },
}
YARDSTICK = "as many bytes, added"
BYTES_MOVED = {"LARS": 20, "LAMB": 28}  # of float32, for each parameter
COLOURS = {"big": "#1f77b4", "tor": "#7f7f7f", "tim": "#ff7f0e", "pyt": "#d6a35c"}


def shapes_of(name: str) -> list[torch.Size]:
    if name == "bert_large":
        return bert_large()
    with torch.device("meta"):
        model = timm.create_model({"resnet50": "resnet50", "vit_b": "vit_base_patch16_224"}[name])
    return [p.shape for p in model.parameters()]


def bert_large() -> list[torch.Size]:
    """BERT-large for pre-training: 24 layers of width 1024, decoder tied to the embedding; 336,226,108 parameters."""
    width, wide, words = 1024, 4096, 30522
    norm = [(width,), (width,)]
    dense = [(width, width), (width,)]
    layer = [*dense * 4, *norm, (wide, width), (wide,), (width, wide), (width,), *norm]
    embeddings = [(words, width), (512, width), (2, width), *norm]
    heads = [*dense, (words,), *dense, *norm, (2, width), (2,)]
    return [torch.Size(shape) for shape in [*embeddings, *layer * 24, *heads]]


def milliseconds(work: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return 1e3 * (clock() - start)


def share(optimizer: torch.optim.Optimizer, shared: list[dict[nn.Parameter, Tensor]]) -> None:
    """Take one step, then swap the state tensors that are shaped like their parameters for the shared ones."""
    optimizer.step()
    for p, state in optimizer.state.items():
        keys = [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == p.shape and p.ndim]
        for key, tensors in zip(keys, shared, strict=False):
            state[key] = tensors.setdefault(p, state[key])


def measure(name: str, family: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round, for every optimiser and for the yardstick."""
    torch.manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes_of(name)]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    gradients = [p.grad.clone() for p in params if p.grad is not None]
    shared: list[dict[nn.Parameter, Tensor]] = [{}, {}]
    optimizers = {label: build(params) for label, build in FAMILIES[family].items()}
    for optimizer in optimizers.values():
        share(optimizer, shared)
    source, target = torch.randn(1 << 25), torch.randn(1 << 25)
    additions = BYTES_MOVED[family] * sum(p.numel() for p in params) / (12 * source.numel())
    times: dict[str, list[float]] = {YARDSTICK: [], **{label: [] for label in optimizers}}
    for _ in range(rounds):
        times[YARDSTICK].append(additions * milliseconds(lambda: target.add_(source)))
        for label, optimizer in optimizers.items():
            times[label].append(milliseconds(optimizer.step))
            if label == "pytorch_optimizer LARS":
                for p, gradient in zip(params, gradients, strict=True):
                    p.grad = gradient.clone()
    return times


def table_of(name: str, family: str, times: dict[str, list[float]]) -> Table:
    medians = {label: statistics.median(values) for label, values in times.items()}
    peers = [next(label for label in times if label.startswith(peer)) for peer in ("torch", "timm", "pytorch_opt")]
    table = Table("", "median ms", "quartiles", "fastest", *(f"× {peer}" for peer in peers), title=f"{name}, {family}")
    for label, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        ratios = [f"{medians[label] / medians[peer]:.2f}" for peer in peers]
        table.add_row(label, f"{medians[label]:.1f}", f"{low:.1f} to {high:.1f}", f"{min(values):.1f}", *ratios)
    return table


def draw(results: dict[tuple[str, str], dict[str, list[float]]], path: Path) -> None:
    """Bars of the medians with their quartiles; a dashed line is the yardstick."""
    matplotlib.use("Agg")
    names = list(dict.fromkeys(name for name, _ in results))
    figure, axes = pyplot.subplots(2, len(names), figsize=(5.2 * len(names), 6.4), squeeze=False, layout="constrained")
    for (name, family), times in results.items():
        axis = axes[list(FAMILIES).index(family)][names.index(name)]
        labels = [label for label in times if label != YARDSTICK]
        quartiles = {label: statistics.quantiles(times[label], n=4) for label in times}
        spread = [
            [quartiles[x][1] - quartiles[x][0] for x in labels],
            [quartiles[x][2] - quartiles[x][1] for x in labels],
        ]
        axis.barh(labels, [quartiles[x][1] for x in labels], xerr=spread, color=[COLOURS[x[:3]] for x in labels],
                  error_kw={"lw": 1, "capsize": 2})  # fmt: skip
        axis.axvline(quartiles[YARDSTICK][1], color="black", lw=1, ls="--")
        axis.set(title=f"{name}, {family} family", xlabel="ms per step (dashed: as many bytes, added)")
        axis.invert_yaxis()
        if names.index(name):
            axis.set_yticklabels([])
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["resnet50", "vit_b", "bert_large"]
    parser.add_argument("--shapes", nargs="+", choices=known, default=known)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--chart", type=Path, default=Path(__file__).with_suffix(".png"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console, results = Console(width=110), {}
    for name in args.shapes:
        for family in FAMILIES:
            results[name, family] = measure(name, family, args.rounds)
            console.print(table_of(name, family, results[name, family]))
    draw(results, args.chart)


if __name__ == "__main__":
    main()
