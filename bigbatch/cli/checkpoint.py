"""``bigbatch checkpoint``: what a run has saved, whether it is whole, and out of one a model for plain PyTorch."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch import __version__
from bigbatch.cli import FAILED, OK, _say
from bigbatch.config import ConfigError, RunConfig, dump_config, load_config
from bigbatch.config.models import Classification, CustomTask, Text
from bigbatch.custom import ALLOW
from bigbatch.spec import Spec

if TYPE_CHECKING:
    from bigbatch.data.preprocess import State
    from bigbatch.train.saved import Saved

PLAN = ("what", "value", "why")
CARD = """\
# {model} on {data}

Trained by bigbatch {version}: {steps} steps of the recipe in `config.yaml`.

{scores}

{plan}

```python
import torch
from safetensors.torch import load_file
{build}
model.load_state_dict(load_file("model.safetensors"))
model.eval()
{usage}```
"""
NAMES = """\
with open("classes.json") as file:
    names = json.load(file)
print(names[int(logits[0].argmax())])
"""
IMAGES = """\
{statistics}


def preprocess(images):
    {preprocess}


images = torch.zeros(1, {shape}, dtype=torch.uint8)
logits = model(preprocess(images))
"""
TEXT = """\
tokenizer = Tokenizer.from_file("tokenizer.json")
tokens = torch.tensor([[{cls}, *tokenizer.encode("in the beginning", add_special_tokens=False).ids]])
logits = model(input_ids=tokens).logits
"""
OTHER = """\
from bigbatch.config import load_config
from bigbatch.spec import Spec
from bigbatch.tasks import build_task

{note}task = build_task(load_config("config.yaml").task, {spec})
model = task.build_model()"""


def add_checkpoint(verbs: Any) -> None:
    """Add the verb to those of argparse."""
    text = "List and verify a run's checkpoints, or export one as a plain model."
    parser = verbs.add_parser("checkpoint", help=text, description=text)
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    for run, path, text in (
        (_ls, "run directory", "List steps, samples and sizes, what is damaged, the newest and the best."),
        (_verify, "run directory", "Exit 1 and name it if one is damaged, or if there is none."),
        (_export, "run directory or checkpoint", "Write weights, recipe and a model card to a new directory."),
    ):
        action = actions.add_parser(run.__name__[1:], help=text, description=text)
        action.set_defaults(verb=run)
        action.add_argument("path", help=path)
    actions.choices["ls"].add_argument("--json", action="store_true", help="print the list as JSON")
    actions.choices["export"].add_argument("dest", help="directory that is not there yet")


def _ls(args: argparse.Namespace) -> int:
    rows = _rows(_run(args.path))
    if args.json:
        print(json.dumps(rows, indent=2))
        return OK
    print(f"{'step':>8}  {'samples':>12}  {'MB':>8}")
    for row in rows:
        marks = [mark for mark in ("newest", "best") if row[mark]]
        about = ", ".join([row["damage"] or "whole", *marks])
        print(f"{row['step']:>8}  {row['samples'] or '':>12}  {row['bytes'] / 1e6:>8.1f}  {about}")
    return OK


def _verify(args: argparse.Namespace) -> int:
    rows = _rows(_run(args.path))
    damage = [row["damage"] for row in rows if row["damage"]]
    if damage or not rows:
        return _say("; ".join(damage) or f"{args.path}: no checkpoint yet; train first", FAILED)
    print(f"{len(rows)} whole: {', '.join(row['path'] for row in rows)}")
    return OK


def _export(args: argparse.Namespace) -> int:
    run, dest = _run(args.path), Path(args.dest)
    if os.path.lexists(dest):
        raise ConfigError(f"{dest}: is there already and was left alone; give another directory")
    config = load_config(run / "config.yaml")
    part = dest.with_name(f".{dest.name}.{os.getpid()}.part")

    from bigbatch.train import RunError, open_checkpoint, open_newest
    from bigbatch.train.saved import MODEL, PREPROCESS

    try:
        saved = open_newest(run / "checkpoints") if run == Path(args.path) else open_checkpoint(Path(args.path))
        spec, tokenizer = saved.spec(), run / "tokenizer.json"
        card = _card(config, spec, run, saved)
        part.mkdir(parents=True)
        copy = replace(saved, path=part)
        for name, load in ((MODEL, copy.model), (PREPROCESS, copy.preprocess)):
            shutil.copyfile(saved.path / name, part / name)
            load()  # which holds the copy against the checksum
        (part / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        if spec.names:
            (part / "classes.json").write_text(json.dumps(spec.names, indent=2))
        if isinstance(config.data, Text) or tokenizer.is_file():
            shutil.copyfile(tokenizer, part / tokenizer.name)
        (part / "README.md").write_text(card, encoding="utf-8")
        part.rename(dest)
    except (RunError, OSError) as error:
        return _say(f"{dest}: {error}", FAILED)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{dest}: the model of {saved.path}")
    return OK


def _run(path: str) -> Path:
    """The run directory that a path is, or in which a checkpoint lies."""
    for run in (Path(path), Path(path).absolute().parent.parent):
        if (run / "config.yaml").is_file():
            return run
    raise ConfigError(f"{path}: neither a run directory (with config.yaml) nor a checkpoint in one")


def _rows(run: Path) -> list[dict[str, Any]]:
    """What can be said of each checkpoint of a run, by step."""
    from bigbatch.train import RunError, open_checkpoint
    from bigbatch.train.checkpoint import Checkpoints
    from bigbatch.train.saved import step_of

    settings = load_config(run / "config.yaml").checkpoint
    checkpoints = Checkpoints(run / "checkpoints", keep=1, best=settings.best, best_is=settings.best_is)
    rows: list[dict[str, Any]] = []
    whole = []
    for path in checkpoints.paths():
        samples, damage, size = None, None, 0
        try:
            size = sum(file.stat().st_size for file in path.glob("*") if file.is_file())
            samples = open_checkpoint(path).state["samples"]
            whole.append(path)
        except (RunError, OSError) as error:
            if not os.path.lexists(path):
                continue  # the run has deleted it meanwhile
            damage = str(error)
        rows.append({"path": path, "step": step_of(path), "samples": samples, "bytes": size, "damage": damage})
    newest, best = whole[-1] if whole else None, checkpoints.best_of(whole)
    for row in rows:
        path = row["path"]
        row |= {"path": str(path), "newest": path == newest, "best": path == best}
    return rows


def _card(config: RunConfig, spec: Spec, run: Path, saved: Saved) -> str:
    preprocess, state, shape = saved.preprocess(), saved.state, spec.shape
    gets = shape if "matrix" not in preprocess else tuple(preprocess["matrix"].shape[1:])
    name, build = _build(config, replace(spec, shape=gets), channels=shape[0])
    if config.norm.kind != "batch":
        norm = f"Norm(kind={config.norm.kind!r}, groups={config.norm.groups})"
        build = f"from bigbatch.config.models import Norm\nfrom bigbatch.norm import convert_norm\n{build}\n"
        build += f"convert_norm(model, norm={norm}, micro=1, neighbours=None)"
    usage = ""
    if isinstance(config.data, Text):
        build = f"from tokenizers import Tokenizer\n{build}"
        usage = TEXT.format(cls=spec.special["cls"])
    if preprocess:
        statistics, code = _code(preprocess)
        usage = IMAGES.format(statistics=statistics, preprocess=code, shape=", ".join(map(str, shape)))
        if spec.names:
            build, usage = f"import json\n\n{build}", usage + NAMES
    metrics = {f"validation {metric}": f"{value:.4g}" for metric, value in (state["metrics"] or {}).items()}
    decisions = json.loads((run / "plan.json").read_text(encoding="utf-8"))["decisions"]
    return CARD.format(
        model=name,
        data=config.data.name,
        version=__version__,
        steps=state["step"],
        scores=_table(("metric", "value"), *metrics.items()),
        plan=_table(PLAN, *([each[key] for key in PLAN] for each in decisions)),
        build=build,
        usage=usage,
    )


def _build(config: RunConfig, spec: Spec, *, channels: int) -> tuple[str, str]:
    """The model's name, and the code that makes it."""
    from bigbatch.tasks import OWN

    task = config.task
    spec = replace(spec, names=())
    if isinstance(task, CustomTask):
        return task.target, OTHER.format(note=f"# runs the recipe's own code: set {ALLOW}=1\n", spec=spec)
    if not isinstance(task, Classification):
        return task.model, OTHER.format(note="", spec=spec)
    if task.model.startswith("timm/"):
        arguments = f"{task.model.removeprefix('timm/')!r}, in_chans={channels}, num_classes={spec.classes}"
        return task.model, f"import timm\n\nmodel = timm.create_model({arguments}, **{task.options})"
    arguments, own = f"shape={spec.shape}, classes={spec.classes}", OWN[task.model].__name__
    return task.model, f"from bigbatch.tasks import {own}\n\nmodel = {own}({arguments}, **{task.options})"


def _code(preprocess: State) -> tuple[str, str]:
    """What preprocesses as the run did: where its statistics come from, and the body of a function of the images. Those
    of whole channels need no file."""
    scale, shift = preprocess["scale"], preprocess["shift"]
    whiten = "matrix" in preprocess
    if scale.dim() == 3 and scale.shape[1:].numel() == 1 and not whiten:
        mean, std = ([round(v, 12) for v in t.flatten().tolist()] for t in (-shift / scale / 255, 1 / scale / 255))
        statistics = f"mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ({mean}, {std}))"
        return statistics, "return (images / 255 - mean) / std"
    lines = ['images = images * saved["scale"] + saved["shift"]', "return images.float()"]
    if whiten:
        lines[1:1] = [
            'matrix = saved["matrix"]',
            "images = (images.flatten(1) @ matrix.flatten(1)).view(-1, *matrix.shape[1:])",
        ]
    return 'saved = load_file("preprocess.safetensors")', "\n    ".join(lines)


def _table(head: Sequence[str], *rows: Sequence[str]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
