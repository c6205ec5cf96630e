"""SLURM: who a process is that plain ``srun`` started, and the batch script of a recipe."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from bigbatch.cli import FAILED, OK, _positive, make_plan
from bigbatch.config import ConfigError, load_config
from bigbatch.custom import allowed, check_allowed

TEMPLATE = Path(__file__).with_name("train.sbatch")


def join_step() -> None:
    """Tell this task of a SLURM step its rank and where rank 0 is, as torchrun would.

    ``srun`` alone starts tasks that do not know of each other, and each would train on its own. The step's first node
    is the head. The port follows from the job, so that jobs which share the node do not meet: 10000 + (31 × job id +
    7 × restarts of the job + step) mod 20000. MASTER_ADDR and MASTER_PORT stay where they are set.
    """
    env = os.environ
    if "WORLD_SIZE" in env or env.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    job, restarts, step = (int(env.get(f"SLURM_{name}", 0)) for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
    env.setdefault("MASTER_PORT", str(10000 + (31 * job + 7 * restarts + step) % 20000))
    env |= {"RANK": env["SLURM_PROCID"], "LOCAL_RANK": env["SLURM_LOCALID"], "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"]}


def first_host(nodes: str) -> str:
    """The first name of a list in SLURM's notation, ``n[003-005,9],m1``; containers often have no scontrol to ask."""
    first = re.split(r",(?![^[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first)


def add_to(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """The verb and its options; the rest of sbatch's go through ``--sbatch``."""
    parser = verb("slurm", run, "Show or submit the SLURM batch script of a recipe whose plan is legal.")
    parser.add_argument("--nodes", type=_positive, default=1, help="number of nodes (%(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=_positive, help="GPUs, and processes, of a node; without it one process"
    )
    parser.add_argument("--time", help="time limit, as 12:00:00; a run that needs longer is queued again and goes on")
    parser.add_argument("--partition", help="where to run")
    parser.add_argument("--job-name", help="name of the job, its log and its run directory; unless given the recipe's")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="another option of sbatch, as account=me"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the script there instead of showing it")
    parser.add_argument("--submit", action="store_true", help="hand the script to sbatch")


def run(args: argparse.Namespace) -> int:
    """Show, write or submit the batch script of a recipe, once its plan for so many processes has proved legal."""
    options = {"job-name": args.job_name or Path(args.config).stem, "nodes": str(args.nodes)}
    asked = {"gpus-per-node": args.gpus_per_node, "time": args.time, "partition": args.partition}
    own = options.keys() | asked.keys()
    options |= {name: str(value) for name, value in asked.items() if value}
    for option in args.sbatch:
        name, equals, value = option.lstrip("-").partition("=")
        if not equals:
            raise ConfigError(f"--sbatch {option}: write OPTION=VALUE, for example account=me")
        if name in own:
            raise ConfigError(f"--sbatch {option}: there is an option for it; write --{name} {value}")
        options[name] = value
    if args.submit and not shutil.which("sbatch"):
        raise ConfigError("--submit: there is no sbatch here; write the script with -o and submit it on the cluster")
    config = load_config(args.config, args.overrides)
    check_allowed(config)
    make_plan(config, world_size=args.nodes * (args.gpus_per_node or 1))
    text = batch_script([args.config, *args.overrides, *["--allow-custom"] * allowed()], options)
    if args.output:
        try:
            Path(args.output).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {args.output}: cannot be written ({error.strerror})") from None
    else:
        print(text, end="", flush=True)
    if args.submit and subprocess.run(["sbatch"], input=text, text=True).returncode:
        return FAILED
    return OK


def batch_script(arguments: list[str], options: dict[str, str]) -> str:
    """``slurm/train.sbatch`` with these options of sbatch and these arguments of ``bigbatch train``."""
    head, start, body = TEMPLATE.read_text(encoding="utf-8").partition("set -euo pipefail\n")
    replaced = tuple(f"#SBATCH --{name}=" for name in options)
    lines = [line for line in head.splitlines() if not line.startswith(replaced)]
    lines += [f"#SBATCH --{name}={shlex.quote(value)}" for name, value in options.items()]
    return "\n".join([*lines, f'set -- {shlex.join(arguments)} "$@"', start + body])
