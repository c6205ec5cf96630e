"""From the config's optimiser section to a torch optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigbatch.config.models import Optim

from .groups import parameter_groups
from .lamb import LAMB
from .lars import LARS

_CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "lars": LARS,
    "lamb": LAMB,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adadelta": torch.optim.Adadelta,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam,
    "nadam": torch.optim.NAdam,
}
_FUSED = {"sgd": ("cpu", "cuda"), "adagrad": ("cpu",), "adam": ("cpu", "cuda"), "adamw": ("cpu", "cuda")}
_FUSED_SHARDED = ("adam", "adamw")


def build_optimizer(config: Optim, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of ``config`` over the trainable parameters of ``model``, grouped by ``config.groups``.

    Each group has ``lr`` = config.lr · lr_scale and keeps ``lr_scale`` for whoever sets the rate of later steps.
    torch's SGD, Adagrad, Adam and AdamW are fused where their kernels allow, the other torch optimisers ``foreach``.
    Raises ValueError naming the key for options that exclude each other and for rules that do not fit the model.
    """
    groups = parameter_groups(model, rules=config.groups, weight_decay=config.weight_decay)
    params = [p for group in groups for p in group["params"]]
    options = config.model_dump(exclude={"name", "groups"})
    _check(config.name, options)
    try:
        return _CLASSES[config.name](
            [group | {"lr": config.lr * group["lr_scale"]} for group in groups],
            **options,
            **_kernel(config.name, params),
        )
    except ValueError as error:
        raise ValueError(f"optim.{error}") from None


def _check(name: str, options: dict[str, Any]) -> None:
    if name != "sgd":
        return
    if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
        raise ValueError("optim.nesterov = True: needs momentum > 0 and dampening 0; set those or leave it off")
    if options["dampening"] and options["momentum"] == 0:
        value = options["dampening"]
        raise ValueError(f"optim.dampening = {value}: has no meaning at momentum 0; set momentum > 0 or leave it 0")


def _kernel(name: str, params: Sequence[Tensor]) -> dict[str, bool]:
    if name in ("lars", "lamb"):
        return {}
    devices = _FUSED.get(name, ())
    if name not in _FUSED_SHARDED and any(isinstance(p, DTensor) for p in params):
        devices = ()
    return {"fused": True} if all(_fusible(p, devices) for p in params) else {"foreach": True}


def _fusible(p: Tensor, devices: tuple[str, ...]) -> bool:
    # The CPU's fused kernels walk memory, not indices: wrong where a weight and its gradient differ in layout.
    return p.is_floating_point() and p.device.type in devices and (p.is_contiguous() or p.device.type != "cpu")
