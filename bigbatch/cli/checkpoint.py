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
from bigbatch.cli import FAILED, OK, _say, add_allow_custom
from bigbatch.config import ConfigError, RunConfig, dump_config, load_config
from bigbatch.config.models import Classification

if TYPE_CHECKING:
    from bigbatch.data import Dataset
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
{prepare}

images = torch.zeros(1, {shape}, dtype=torch.uint8)
logits = model(preprocess(images))
```
"""
SHORT = """\
mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ({mean}, {std}))


def preprocess(images):
    return (images / 255 - mean) / std
"""
AFFINE = """\
saved = load_file("preprocess.safetensors")  # float64


def preprocess(images):
    {affine}
"""
WHITEN = """\
rows = (images * saved["scale"] + saved["shift"]).flatten(1)
    matrix = saved["matrix"]
    return (rows @ matrix.flatten(1)).view(-1, *matrix.shape[1:]).float()"""


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
    add_allow_custom(actions.choices["export"])


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

    from bigbatch.data import load_data
    from bigbatch.train import RunError, open_checkpoint, open_newest
    from bigbatch.train.saved import MODEL, PREPROCESS

    try:
        saved = open_newest(run / "checkpoints") if run == Path(args.path) else open_checkpoint(Path(args.path))
        card = _card(config, load_data(config.data, seed=config.seed), run, saved)
        part.mkdir(parents=True)
        copy = replace(saved, path=part)
        for name, load in ((MODEL, copy.model), (PREPROCESS, copy.preprocess)):
            shutil.copyfile(saved.path / name, part / name)
            load()  # which holds the copy against the checksum
        (part / "config.yaml").write_text(dump_config(config), encoding="utf-8")
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


def _card(config: RunConfig, dataset: Dataset, run: Path, saved: Saved) -> str:
    from bigbatch.tasks import OWN

    assert isinstance(config.task, Classification)
    name, options, shape = config.task.model, config.task.options, dataset.spec.shape
    preprocess, state = saved.preprocess(), saved.state
    gets = shape if "matrix" not in preprocess else tuple(preprocess["matrix"].shape[1:])
    if name.startswith("timm/"):
        arguments = f"{name.removeprefix('timm/')!r}, in_chans={shape[0]}, num_classes={dataset.spec.classes}"
        build = f"import timm\n\nmodel = timm.create_model({arguments}, **{options})"
    else:
        arguments, own = f"shape={gets}, classes={dataset.spec.classes}", OWN[name].__name__
        build = f"from bigbatch.tasks import {own}\n\nmodel = {own}({arguments}, **{options})"
    if config.norm.kind != "batch":
        norm = f"Norm(kind={config.norm.kind!r}, groups={config.norm.groups})"
        build = f"from bigbatch.config.models import Norm\nfrom bigbatch.norm import convert_norm\n{build}\n"
        build += f"convert_norm(model, norm={norm}, micro=1, neighbours=None)"
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
        prepare=_prepare(preprocess),
        shape=", ".join(map(str, shape)),
    )


def _prepare(preprocess: State) -> str:
    """Code that preprocesses as the run did; that of mean and standard deviation needs no file."""
    scale, shift = preprocess["scale"], preprocess["shift"]
    if "matrix" in preprocess:
        return AFFINE.format(affine=WHITEN).rstrip()
    if scale.dim() < 3 or scale.shape[1:].numel() > 1:
        return AFFINE.format(affine='return (images * saved["scale"] + saved["shift"]).float()').rstrip()
    mean, std = (
        [round(value, 12) for value in values.flatten().tolist()] for values in (-shift / scale / 255, 1 / scale / 255)
    )
    return SHORT.format(mean=mean, std=std).rstrip()


def _table(head: Sequence[str], *rows: Sequence[str]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
