"""A model's batch norms become ours, or another kind of norm."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bigbatch.config.models import Norm
from bigbatch.plan.layout import divisors, nearest

from .batch import GroupNormAct, SpanBatchNorm, SpanBatchNormAct
from .kernel import Reduce

KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SpanBatchNorm)


def convert_norm(model: nn.Module, *, norm: Norm, micro: int, neighbours: Callable[[int], Reduce]) -> nn.Module:
    """Replace every batch norm of the model, in place, as ``norm`` says; returns the model (or what replaced it).

    kind batch: `SpanBatchNorm` of ``norm.span`` samples, a divisor of the micro batch, or q times the micro batch, for
    which ``neighbours(q)`` gives the sum over q neighbouring ranks. group: nn.GroupNorm of ``norm.groups`` groups, or
    as many as there are channels where those are fewer (Wu & He 2018, arXiv:1803.08494); layer: one group (Ba et
    al. 2016, arXiv:1607.06450); instance: a group per channel (Ulyanov et al. 2016, arXiv:1607.08022).
    Parameters, running buffers, eps, momentum and training mode are taken over, timm's drop and activation too.

    Raises ValueError for a setting that cannot be met or would have no effect.
    """
    layers = {module: name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for module, name in layers.items():
        _check_layer(module, name)
    _check_effect(norm, has_batch_norm=bool(layers))
    if not layers:
        return model
    if norm.kind == "batch":
        span = micro if norm.span == "micro" else norm.span
        _check_span(span, micro)
        reduce = neighbours(span // micro) if span > micro else None
        new: dict[nn.Module, nn.Module] = {old: _span_norm(old, span=span, reduce=reduce) for old in layers}
    else:
        if norm.kind == "group":
            _check_groups(norm.groups, sorted({module.num_features for module in layers}))
        new = {old: _group_norm(old, norm) for old in layers}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent.register_module(name, new[child])
    return new.get(model, model)


def _span_norm(old: _BatchNorm, *, span: int, reduce: Reduce | None) -> nn.Module:
    assert old.momentum is not None and old.running_mean is not None
    make = SpanBatchNormAct if _has_activation(old) else SpanBatchNorm
    new = make(old.num_features, span=span, reduce=reduce, eps=old.eps, momentum=old.momentum, affine=False)
    new.to(old.running_mean.device, old.running_mean.dtype)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(new, name, getattr(old, name))
    return _take_over(new, old)


def _group_norm(old: _BatchNorm, norm: Norm) -> nn.Module:
    channels = old.num_features
    groups = {"group": min(norm.groups, channels), "layer": 1, "instance": channels}[norm.kind]
    new = (GroupNormAct if _has_activation(old) else nn.GroupNorm)(groups, channels, old.eps, affine=False)
    return _take_over(new, old)


def _take_over(new: SpanBatchNorm | nn.GroupNorm, old: _BatchNorm) -> nn.Module:
    new.affine, new.weight, new.bias = old.affine, old.weight, old.bias
    if _has_activation(old):
        new.drop, new.act = old.drop, old.act
    return new.train(old.training)


def _has_activation(module: nn.Module) -> bool:
    return hasattr(module, "drop") and hasattr(module, "act")


def _check_layer(module: _BatchNorm, name: str) -> None:
    what = f"{name or 'the model'}: {type(module).__name__}"
    if type(module) not in KNOWN and not _has_activation(module):
        raise ValueError(f"{what}: not a batch norm whose meaning is known; use torch.nn.BatchNorm1d, 2d or 3d")
    if not module.track_running_stats or module.momentum is None:
        raise ValueError(f"{what}: needs track_running_stats=True and a number as momentum, got {module}")


def _check_effect(norm: Norm, *, has_batch_norm: bool) -> None:
    if norm.kind != "batch" and not has_batch_norm:
        raise ValueError(f"norm.kind = {norm.kind}: the model has no batch norm to convert; remove norm.kind")
    if norm.span != "micro" and not has_batch_norm:
        raise ValueError(f"norm.span = {norm.span}: the model has no batch norm to apply it to; remove norm.span")
    if norm.span != "micro" and norm.kind != "batch":
        raise ValueError(
            f"norm.span = {norm.span}: norm.kind {norm.kind} has no span; remove it or use norm.kind=batch"
        )


def _check_span(span: int, micro: int) -> None:
    if micro % span and span % micro:
        whole = span // micro * micro
        legal = nearest(span, [*divisors(micro), whole or micro, whole + micro])
        raise ValueError(
            f"norm.span = {span}: must divide the micro batch of {micro}, or be it times a number of processes; "
            f"nearest legal: {legal}"
        )


def _check_groups(groups: int, channels: list[int]) -> None:
    legal = [g for g in range(1, channels[-1] + 1) if all(c % min(g, c) == 0 for c in channels)]
    for count in channels:
        if count % min(groups, count):
            raise ValueError(f"norm.groups = {groups}: does not divide a layer of {count} channels; use one of {legal}")
