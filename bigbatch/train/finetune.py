"""A run that begins with the weights of another, and parameters that stay as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from platform import node
from typing import Literal

from safetensors.torch import load_file
from torch import Tensor, nn

from bigbatch.config import ConfigError
from bigbatch.data.tokenizer import check_tokenizer
from bigbatch.norm import SpanBatchNorm
from bigbatch.tasks import Pretrained

from .checkpoint import open_newest
from .saved import MANIFEST, MODEL, open_checkpoint
from .state import Clock, Parts, RunError

PRETRAINED = "pretrained"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Have parameters whose name a pattern matches (``re.search``) keep their values.

    A batch norm with no other parameters keeps its running statistics too, and normalises with them in training.
    Raises ValueError for a pattern that matches nothing or is no regular expression, and if nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        try:
            found = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(f"task.freeze: {pattern!r} is no regular expression ({error}); escape its dots") from None
        if not found:
            raise ValueError(f"task.freeze: {pattern!r} matches no parameter; there are {_some(names)}")
        for name in found:
            model.get_parameter(name).requires_grad_(False)
    if patterns and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"task.freeze = {list(patterns)}: nothing is left to train; freeze less")
    for module in model.modules():
        own = list(module.parameters())
        if patterns and isinstance(module, SpanBatchNorm) and own and not any(p.requires_grad for p in own):
            module.frozen = True
            module.eval()


def start(parts: Parts) -> Clock:
    """The beginning of a run: with ``task.weights``, of which the head may be left out, or as the model was made.

    For a run without a checkpoint: one that goes on has no use for them, and they may be gone. Each process reads the
    file that rank 0 found. Raises ConfigError, on every process, where they cannot be read or are of another model.
    """
    settings, runtime = parts.config.task, parts.runtime
    if settings.weights is None:
        return Clock()
    if settings.weights == PRETRAINED:
        if not isinstance(parts.task, Pretrained):
            raise ConfigError(f"task.weights = pretrained: {settings.what} has none; give a checkpoint or a file")
        weights = _pretrained(parts, parts.task)
    else:
        with runtime.together():
            tokenizer = parts.loader.dataset.tokenizer
            found = _find(settings.weights, tokenizer) if runtime.rank == 0 else None
        found = runtime.agree(found)
        with runtime.together():
            weights = _read(found)
    with runtime.together():  # one machine's copy may be an old one
        try:
            taken = fitted(parts.model, weights, head=settings.head, norm=parts.config.norm.kind)
        except ValueError as error:
            raise ConfigError(f"task.weights = {settings.weights!r}: {error}") from None
    parts.strategy.load_model(taken, strict=False)
    return Clock()


def _pretrained(parts: Parts, task: Pretrained) -> dict[str, Tensor]:
    with parts.runtime.first_on_this_machine():
        try:
            return task.pretrained()
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _find(weights: str, tokenizer: str) -> Path:
    """The file of a checkpoint, the newest of a run, or as it is named. ConfigError where there is none, and for
    weights of a run on text that had another tokenizer."""
    path, way_out = Path(weights).expanduser(), "give a run or checkpoint directory, or a .safetensors file"
    file = path / MODEL if path.is_dir() else path
    try:
        if (path / "checkpoints").is_dir():
            file = open_newest(path / "checkpoints").path / MODEL
        elif (path / MANIFEST).is_file():
            open_checkpoint(path)
        for folder in [*file.absolute().parents][:3:2]:  # an export's, or that of a run, whose checkpoint this is
            if (folder / "config.yaml").is_file():
                check_tokenizer(tokenizer, folder / "tokenizer.json")
    except (RunError, ValueError) as error:
        raise ConfigError(f"task.weights = {weights!r}: {error}") from None
    if not file.is_file():
        raise ConfigError(f"task.weights = {weights!r}: there is no {file}; {way_out}")
    if file.suffix != ".safetensors":
        raise ConfigError(f"task.weights = {weights!r}: a file that may run code is not opened; {way_out}")
    return file


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # a damaged file breaks its reader in any way
        raise ConfigError(f"task.weights: {file} cannot be read on {node()}: {error}") from None


def fitted(
    model: nn.Module, weights: Mapping[str, Tensor], *, head: Literal["keep", "replace"], norm: str
) -> dict[str, Tensor]:
    """What of ``weights`` the model takes over: all, or all but its last layer's.

    The last layer is timm's classifier, or else the last module that has parameters of its own. Running statistics have
    no use where ``norm`` is not batch. Raises ValueError for names and shapes that the model and the weights do not
    both have.
    """
    own, last = model.state_dict(), tuple(f"{name}." for name in _last_layer(model))
    aliases: dict[nn.Parameter, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(p, set()).add(name)
    shared = {name: names for names in aliases.values() for name in names}
    new = {name for name in {**own, **weights} if head == "replace" and name.startswith(last)}
    useless = STATISTICS if norm != "batch" else ()
    taken = {name: tensor for name, tensor in weights.items() if name not in new and not name.endswith(useless)}
    if tied := [name for name in sorted(new) if shared.get(name, {name}) - new]:
        raise ValueError(f"task.head = replace, and {tied[0]} is another layer's weight too; use task.head=keep")

    missing = [name for name in own if name not in new and not shared.get(name, {name}) & taken.keys()]
    unknown = [name for name in taken if name not in own]
    shaped = [name for name in taken if name in own and taken[name].shape != own[name].shape]
    if wrong := [*missing, *unknown, *shaped]:
        sizes = [f"{name} of {tuple(taken[name].shape)} for {tuple(own[name].shape)}" for name in shaped]
        found = {"lack": missing, "have besides": unknown, "have in other shapes": sizes}
        way_out = "give those of the same model"
        if head == "keep" and all(name.startswith(last) for name in wrong):
            way_out = "set task.head=replace for a new last layer"
        elif all(name.endswith(STATISTICS) for name in wrong):
            way_out = "set norm.kind to what they were trained with"
        they = "; ".join(f"{what} {_some(names)}" for what, names in found.items() if names)
        raise ValueError(f"they {they}; {way_out}")
    return taken


def _last_layer(model: nn.Module) -> tuple[str, ...]:
    known: str | tuple[str, ...] | None = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    name = known or [name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)][-1]
    return (name,) if isinstance(name, str) else tuple(name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
