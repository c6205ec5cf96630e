"""The command line: ``bigbatch VERB CONFIG [key.path=value …]``. Torch is imported only by the verbs that need it."""

from __future__ import annotations

import argparse
import atexit
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from bigbatch.config import ConfigError, RunConfig, load_config, redact
from bigbatch.custom import ALLOW
from bigbatch.plan import Plan
from bigbatch.signals import StopSignal

if TYPE_CHECKING:
    from bigbatch.data.preprocess import State
    from bigbatch.dist import Runtime
    from bigbatch.train import Parts
    from bigbatch.train.saved import Saved

OK, FAILED, USAGE, PREEMPTED = 0, 1, 2, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 1 failed, 2 the input is wrong (one message, no traceback), 75 preempted."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes overrides in one place only; a user writes them before options and after.
    if not hasattr(args, "overrides") or not all("=" in text and text[0] != "-" for text in rest):
        parser.parse_args(argv)
    try:
        if rest:
            args.overrides = [*args.overrides, *rest]
        if args.verb in (_train, _evaluate, _verify):
            from .slurm import join_step

            join_step()
            _check_launch()
        if getattr(args, "allow_custom", False):
            os.environ[ALLOW] = "1"
        return int(args.verb(args))
    except ConfigError as error:
        return _say(_brief(redact(str(error))), USAGE)
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on from the newest checkpoint", 130)


def entry() -> NoReturn:
    """The command as a process."""
    for name in ("stdout", "stderr"):
        setattr(sys, name, _Lenient(getattr(sys, name)))
    code = main()
    if _world_size() > 1:
        # gloo's threads outlive their process group, and one that wants the interpreter while it shuts down aborts a
        # run that is complete. So all that a shutdown does is done here, but for the shutdown.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class _Lenient:
    """A stream whose reader may leave (`| head`) and whose disk may be full: what it does not take is lost, and no run
    ends for it; the exit code tells how it ended."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or io.StringIO()  # it is None where a launcher has closed it

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _parser() -> argparse.ArgumentParser:
    from . import data, doctor, launch, shard, slurm

    parser = argparse.ArgumentParser(prog="bigbatch", description="Large-batch training without guessing.")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, run: object, help: str, *, recipe: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help)
        sub.set_defaults(verb=run)
        if recipe:
            sub.add_argument("config", help="recipe, a YAML file")
            sub.add_argument(
                "overrides", nargs="*", metavar="key.path=value", help="settings that override the recipe's"
            )
            add_allow_custom(sub)
        return sub

    verb("train", _train, "Train a recipe, alone or under torchrun, accelerate launch or srun; run it again to go on.")
    plan = verb("plan", _plan, "Show every number a run would use, with its reason, without training.")
    plan.add_argument("--world-size", type=_positive, default=_world_size(), help="number of processes")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument("--strict", action="store_true", help="exit 2 on any warning")
    evaluate = verb(
        "evaluate", _evaluate, "Evaluate a run's newest checkpoint, or one checkpoint, exactly.", recipe=False
    )
    evaluate.add_argument("path", help="run directory or checkpoint directory")
    evaluate.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that override the run's")
    add_allow_custom(evaluate)
    evaluate.add_argument("--split", choices=("train", "validation", "test"), default="validation")
    verify = verb(
        "verify", _verify, "Run the first steps in several layouts, in fp64, and tell whether they are the same run."
    )
    verify.add_argument(
        "--layouts",
        default="1x1,1x4,2x2,4x1",
        help="processes x accumulation, with w3 behind it three data workers; compared with the first (%(default)s)",
    )
    verify.add_argument(
        "--steps", type=_positive, default=20, help="steps to take, the last with a short window (%(default)s)"
    )
    verify.add_argument("--json", action="store_true", help="print the verdict as JSON")
    launch.add_to(verb)
    doctor.add_to(verb)
    slurm.add_to(verb)
    shard.add_to(verb)
    data.add_to(verb)
    verb("schema", _schema, "Print the JSON schema of a recipe.", recipe=False)
    from .checkpoint import add_checkpoint  # which needs what is above

    add_checkpoint(verbs)
    return parser


def add_allow_custom(parser: argparse.ArgumentParser) -> None:
    """Of a verb that may run what the recipe names as module:Name."""
    parser.add_argument("--allow-custom", action="store_true", help=f"run the recipe's own code (or set {ALLOW}=1)")


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _schema(args: argparse.Namespace) -> int:
    print(json.dumps(RunConfig.model_json_schema(by_alias=True), indent=2, ensure_ascii=False))
    return OK


def _plan(args: argparse.Namespace) -> int:
    plan = make_plan(load_config(args.config, args.overrides), world_size=args.world_size)
    if args.json:
        print(plan.to_json())
    else:
        show_plan(plan)
    warnings = [f"{warning.code}: {warning.message}" for warning in plan.warnings]
    if args.strict and warnings:
        return _say("; ".join(warnings), USAGE)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return OK


def make_plan(config: RunConfig, *, world_size: int) -> Plan:
    """The plan of a recipe whose data says how large it is. Raises ConfigError."""
    from bigbatch.plan import resolve

    return resolve(config, world_size=world_size, dataset_size=_size(config))


def _size(config: RunConfig) -> int:
    from bigbatch.data import size_of

    try:
        return size_of(config.data)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def show_plan(plan: Plan) -> None:
    """The plan as a table: what, value, why, source."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    title = f"plan for {plan.world_size} processes"
    table = Table("what", "value", "why", "source", title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for decision in plan.decisions:
        table.add_row(decision.what, decision.value, decision.why, decision.source)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width to fit into
    console.print(table)


def _train(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    with StopSignal(grace=config.run.grace, code=OK if _launched() else PREEMPTED) as stop:
        return _train_until(stop, config)


def _train_until(stop: StopSignal, config: RunConfig) -> int:
    plan = make_plan(config, world_size=_world_size())

    from bigbatch.data import DataError
    from bigbatch.dist import lost_contact
    from bigbatch.train import Preempted, RunError, preprocess_of_run, train

    if _rank() == 0 and config.tracking.console != "none":
        show_plan(plan)
    try:
        with _assembled(config, plan, lambda runtime: preprocess_of_run(config, runtime)) as parts:
            summary = train(parts, stop)
    except (RunError, DataError) as error:
        return _say(str(error), FAILED)
    except Preempted as message:
        if _rank() == 0:
            print(f"bigbatch: {message}", file=sys.stderr, flush=True)
        return stop.code
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        # Each process says so at once: which of them is to blame, their heartbeats have told.
        what = str(error).partition("\n")[0]
        print(f"bigbatch: rank {_rank()}: another process is gone or silent ({what})", file=sys.stderr, flush=True)
        return FAILED
    if _rank() == 0:
        print(json.dumps({"run": config.run.dir, **summary}))
    return OK


def _evaluate(args: argparse.Namespace) -> int:
    path = Path(args.path).resolve()
    if not path.is_dir():
        raise ConfigError(f"{args.path}: no such directory; give a run directory or a checkpoint in one")
    is_run = (path / "config.yaml").is_file()
    run = path if is_run else path.parent.parent
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{path}: neither a run directory (with config.yaml) nor a checkpoint in one")
    # How the training batch was cut is no matter here, so any number of processes can evaluate.
    anywhere = (
        "parallel.expect_world_size=null",
        "parallel.strategy=ddp",
        "parallel.zero_stage=null",
        "debug=false",
        "batch.micro=auto",
        f"batch.micro_limit={2**62}",
    )
    for fixed in {text.partition("=")[0] for text in anywhere} & {text.partition("=")[0] for text in args.overrides}:
        raise ConfigError(f"{fixed}: evaluate sets it itself, since each process holds the whole model; leave it out")
    if any(text.startswith("data.preprocess") for text in args.overrides):
        raise ConfigError("data.preprocess: evaluate applies what the model was trained with; leave it out")
    config = load_config(run / "config.yaml", [*args.overrides, *anywhere])
    plan = make_plan(config, world_size=1)

    from bigbatch.data import DataError
    from bigbatch.train import RunError, check_classes, evaluate, open_checkpoint, open_newest, unreadable

    try:
        saved = open_newest(path / "checkpoints") if is_run else open_checkpoint(path)
        with _assembled(config, plan, lambda runtime: saved.preprocess()) as parts:
            check_classes(parts, saved)
            _load(parts, saved)
            metrics: dict[str, Any] = evaluate(parts, args.split)
            if missed := unreadable(parts):
                metrics["unreadable"] = missed
    except (RunError, DataError) as error:
        return _say(str(error), FAILED)
    if _rank() == 0:
        print(json.dumps({"checkpoint": str(saved.path), "split": args.split, **metrics}))
    return OK


def _verify(args: argparse.Namespace) -> int:
    if _world_size() > 1:
        raise ConfigError(f"WORLD_SIZE = {_world_size()}: verify starts its own processes; run it without a launcher")
    here = ("debug=false", "parallel.expect_world_size=null")
    config = load_config(args.config, ["precision=fp64", *args.overrides, *here])
    size = _size(config)

    from bigbatch.analysis import Layout, verify
    from bigbatch.dist import RankError

    try:
        verdict = verify(
            config,
            layouts=[Layout.parse(text) for text in args.layouts.split(",")],
            steps=args.steps,
            dataset_size=size,
            say=lambda text: print(f"\r{text}", file=sys.stderr),
        )
    except RankError as error:
        return _say(str(error), FAILED)
    print(verdict.to_json() if args.json else verdict.text(f"{args.config}, {config.precision}"))
    return OK if verdict.same else FAILED


def _load(parts: Parts, saved: Saved) -> None:
    from bigbatch.data.tokenizer import check_tokenizer

    weights = saved.model()
    try:
        check_tokenizer(parts.loader.dataset.tokenizer, saved.path.parents[1] / "tokenizer.json")
        parts.model.load_state_dict(weights)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except RuntimeError as error:
        what = str(error).splitlines()[-1].strip()
        raise ConfigError(f"{saved.path}: holds another model than the overrides describe ({what})") from None


@contextmanager
def _assembled(
    config: RunConfig, plan: Plan, preprocess: Callable[[Runtime], State | None] = lambda runtime: None
) -> Iterator[Parts]:
    """The parts of a run on this process, preprocessing as before if it was. What the data or the model finds wrong
    with the recipe is a ConfigError; samples that cannot be read, perhaps just now, stay a DataError."""
    from bigbatch.data import DataError
    from bigbatch.dist import Runtime
    from bigbatch.train import assemble

    try:
        runtime = Runtime(precision=config.precision, parallel=config.parallel, debug=config.debug)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with runtime:
        try:
            parts = assemble(config, plan, runtime, preprocess=preprocess(runtime), weights="later")
        except DataError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from None
        try:
            yield parts
        finally:
            parts.loader.close()


# A launcher tells each process who it is before torch is there to ask.


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _launched() -> bool:
    """Whether this process's exit code goes to a launcher, which would call 75 a failure."""
    return _world_size() > 1 or "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _check_launch() -> None:
    """Refuse processes that were started as one of several and do not know of the others: each would train alone."""
    if "WORLD_SIZE" in os.environ:
        return
    # Where accelerate launch is to start several, it says where they meet, even if it then starts one.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes and has started one, as it does with --cpu and "
            "MULTI_CPU: use one of launch/accelerate/, or bigbatch launch --nproc"
        )
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(variable, "1") != "1":
            raise ConfigError(
                f"{variable} = {os.environ[variable]}: mpirun starts processes that do not know of each other; have it "
                "start bigbatch launch, once per node"
            )


def _brief(message: str) -> str:
    """One line of a few hundred characters, whatever the message quotes; the key stands first and the way out last."""
    line = " ".join(message.split())
    return line if len(line) <= 600 else f"{line[:400]} … {line[-200:]}"


def _say(message: str, code: int) -> int:
    """Print one message from rank 0 and return the exit code.

    The other ranks nearly always have the same to say. They wait, because a launcher ends all processes when the first
    one leaves and rank 0 must have spoken by then; a rank that is still here afterwards speaks for itself.
    """
    if _rank() > 0:
        time.sleep(5)
        message = f"rank {_rank()}: {message}"
    print(f"bigbatch: {redact(message)}", file=sys.stderr, flush=True)
    return code
