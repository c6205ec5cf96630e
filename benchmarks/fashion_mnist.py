"""Fashion-MNIST from batch 128 to 4,096 in the same 10 epochs: the figures in the recipes' headers.

    python benchmarks/fashion_mnist.py [NAME ...] [--seeds 0 1 2] [--out runs/benchmarks/fashion_mnist]

Trains every recipe with every seed on two processes, skips what is complete, and prints a table of the test accuracy.
SGD at 4,096 is trained at six rates, so that LARS and LAMB are compared with a tuned peer; the rate is chosen on the
validation part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SGD_RATES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)

RUNS: dict[str, tuple[str, ...]] = {
    "sgd_128": ("sgd_128.yaml",),
    "sgd_1024": ("sgd_1024.yaml",),
    **{f"sgd_4096 lr {rate}": ("sgd_4096.yaml", f"optim.lr={rate}") for rate in SGD_RATES},
    "lars_4096": ("lars_4096.yaml",),
    "lamb_4096": ("lamb_4096.yaml",),
}


def train(name: str, seed: int, out: Path) -> dict[str, float] | None:
    """The metrics of one run, trained if it is not complete yet; None where it diverged."""
    run = out / name.replace(" ", "_") / f"seed_{seed}"
    recipe, *overrides = RUNS[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bigbatch"]
    command += ["train", f"configs/fashion_mnist/{recipe}", *overrides]
    command += [f"seed={seed}", f"run.dir={run}", "eval.every=5ep", "checkpoint.every=5ep", "tracking.console=none"]
    if not (run / "summary.json").exists():
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if "steps in a row" in done.stderr:
            return None
        if done.returncode:
            sys.exit(done.stderr)
    summary = json.loads((run / "summary.json").read_text())
    return {"seconds": summary["seconds"], "steps": summary["steps"], **summary["metrics"]}


def spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(RUNS), metavar="NAME", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/fashion_mnist"))
    args = parser.parse_args()
    table = Table("run", "seeds", "steps", "seconds", "validation %", "test %", title="mean ± standard deviation")
    for name in args.names:
        results = [train(name, seed, args.out) for seed in args.seeds]
        good = [result for result in results if result]
        if not good:
            table.add_row(name, str(len(results)), "", "", "diverged", "diverged")
            continue
        seconds = statistics.median(result["seconds"] for result in good)
        scores = [spread([r[key] for r in good]) for key in ("validation_accuracy", "accuracy")]
        lost = f" ({len(results) - len(good)} diverged)" if len(good) < len(results) else ""
        table.add_row(name, str(len(results)) + lost, str(good[0]["steps"]), f"{seconds:.0f}", *scores)
        print(f"{name}: test {scores[1]}", file=sys.stderr, flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
