"""Parameter groups from rules that cover every trainable parameter exactly once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from bigbatch.config.models import GroupRule

DEFAULT_RULES = (GroupRule(match="bias_and_norm", weight_decay=0.0, adapt=False), GroupRule(match="rest"))

_NORM = re.compile(r"Norm(alization)?(?![a-z])")


def parameter_groups(
    model: nn.Module, *, rules: Sequence[GroupRule] | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """One dict per rule: params, param_names, weight_decay, lr_scale, adapt, match; in the rules' order.

    The first rule that matches claims a parameter. ``match`` is one of

    - ``bias_and_norm``: at most one dimension, or ``bias`` among the ``_``-separated words of its own name, or owned
      directly by a normalisation module: one whose class, or a base of it, has the word ``Norm`` or ``Normalization``
      in its CamelCase name (BatchNorm2d, LayerNorm, RMSNorm, timm's BatchNormAct2d; not NormalizedLinear);
    - ``rest``: whatever is left;
    - anything else: a regular expression for ``re.search`` on the dotted name.

    A shared parameter is claimed once, by any of its names, and listed under its first. Frozen parameters are left
    out. Without rules: bias_and_norm with weight decay 0 and no adaptation, then the rest; an empty group is left out.
    ValueError: a rule that matches nothing that is left to it, a parameter without a rule, a broken expression.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            names.setdefault(p, []).append(name)
    if not names:
        raise ValueError(f"model = {type(model).__name__}: no parameter requires a gradient; unfreeze some")
    special = _bias_and_norm(model, names)
    left = dict(names)
    groups = []
    for index, rule in enumerate(DEFAULT_RULES if rules is None else rules):
        where = f"optim.groups[{index}].match = {rule.match!r}"
        claims = _matcher(rule.match, special, where)
        params = [p for p in left if claims(p, names[p])]
        if not params and rules is not None:
            raise ValueError(f"{where}: matches no parameter{_still(left, names)}; correct it or remove the rule")
        for p in params:
            del left[p]
        if params:
            decay = weight_decay if rule.weight_decay is None else rule.weight_decay
            group = {"params": params, "param_names": [names[p][0] for p in params], "weight_decay": decay}
            groups.append(group | {"lr_scale": rule.lr_scale, "adapt": rule.adapt, "match": rule.match})
    if left:
        raise ValueError(f"optim.groups: no rule for {_some(left, names)}; add the rule {{match: rest}} at the end")
    return groups


def _bias_and_norm(model: nn.Module, names: dict[nn.Parameter, list[str]]) -> set[nn.Parameter]:
    owned = {p for m in model.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
    return {p for p in names if p in owned or p.ndim <= 1 or any(_is_bias(name) for name in names[p])}


def _is_norm(module: nn.Module) -> bool:
    return any(_NORM.search(base.__name__) for base in type(module).__mro__)


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2].split("_")


def _matcher(match: str, special: set[nn.Parameter], where: str) -> Callable[[nn.Parameter, list[str]], bool]:
    if match == "rest":
        return lambda p, names: True
    if match == "bias_and_norm":
        return lambda p, names: p in special
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise ValueError(f"{where}: not a regular expression ({error}); escape the special characters") from None
    return lambda p, names: any(pattern.search(name) for name in names)


def _still(left: dict[nn.Parameter, list[str]], names: dict[nn.Parameter, list[str]]) -> str:
    if not left:
        return ", the rules before it have claimed them all"
    return f" of those left, such as {_some(left, names)}"


def _some(left: dict[nn.Parameter, list[str]], names: dict[nn.Parameter, list[str]]) -> str:
    return ", ".join(names[p][0] for p in list(left)[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
