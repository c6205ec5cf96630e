"""Layer-wise adaptive rate scaling."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .layerwise import Group, LayerwiseOptimizer, Params, descend, gradients, rate_and_path, require
from .trust import Tensors, lars_ratios

_OPTIONS = ("momentum", "weight_decay", "nesterov", "trust_coefficient", "eps", "lr_placement", "momentum_correction",
            "denominator", "clip_ratio", "adapt", "maximize")  # fmt: skip


class LARS(LayerwiseOptimizer):
    """LARS (You, Gitman, Ginsburg 2017, arXiv:1708.03888).

    For each layer l with weights w, gradient g, rate γ, momentum m, weight decay β and trust coefficient η::

        λ = η‖w‖ / (‖g‖ + β‖w‖ + ε)        denominator "sum"; "joint": η‖w‖ / (‖g + βw‖ + ε)
        v ← m v + γ λ (g + βw);   w ← w − v          lr_placement "inside" (the paper, MLPerf)
        v ← m v + λ (g + βw);     w ← w − γ v        lr_placement "outside" (torch's SGD)

    λ = 1 where ‖w‖ or ‖g‖ is 0. Weight decay 0 does not switch adaptation off; a group with ``adapt=False`` takes
    the step of SGD with momentum at the rate γ (λ = 1), decay and placement as the group says.

    nesterov: the step looks ahead by one application of m. With a = γλ(g + βw), or λ(g + βw) outside:
    inside w ← w − (a + m v), outside w ← w − γ(a + m v), which is torch's. Equal at constant γ.
    momentum_correction (Goyal et al. 2017, arXiv:1706.02677, remark 2; inside only): v ← m (γ_t/γ_{t−1}) v + …
    The buffer is stored divided by γ, where the factor is exactly 1: nothing is divided by a previous rate of 0 (its
    limit is taken), and the iterates are those of "outside", which needs no correction.
    clip_ratio (LARC): the layer's rate is min(λ, γ) in place of γλ.

    Differs from the paper: at the defaults only in λ = 1 where a norm is 0; the other settings go beyond it.

    lr may be a 0-dim tensor, best on the parameters' device (needed in a CUDA graph); there is nothing else to make
    a step capturable. Norms are float32 (float64 for float64 weights); the buffer has the weight's dtype.
    foreach None: all layers of a device at once unless on the CPU. Raises ValueError for illegal options.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        lr_placement: Literal["inside", "outside"] = "inside",
        momentum_correction: bool = False,
        denominator: Literal["sum", "joint"] = "sum",
        clip_ratio: bool = False,
        adapt: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        super()._check(group)
        require(0 <= group["momentum"] < 1, "momentum", group, "give a number in [0, 1)")
        require(group["trust_coefficient"] > 0, "trust_coefficient", group, "give a number > 0")
        require(group["lr_placement"] in ("inside", "outside"), "lr_placement", group, "choose inside or outside")
        require(group["denominator"] in ("sum", "joint"), "denominator", group, "choose sum or joint")
        for field in ("nesterov", "momentum_correction"):
            legal = not group[field] or group["momentum"] > 0
            require(legal, field, group, "has no meaning at momentum 0; set momentum > 0 or leave it off")
        legal = not group["momentum_correction"] or group["lr_placement"] == "inside"
        way_out = "lr_placement outside behaves so already; set lr_placement inside or leave it off"
        require(legal, "momentum_correction", group, way_out)

    def _update(self, buckets: list[tuple[Group, list[Tensor]]]) -> None:
        for group, params in buckets:
            buffers = [self._state(p, "momentum_buffer") for p in params] if group["momentum"] else None
            options = {key: group[key] for key in _OPTIONS} | rate_and_path(group, params)
            lars(params, gradients(params), buffers, **options)


def lars(
    params: Tensors,
    grads: Tensors,
    buffers: Tensors | None,
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    trust_coefficient: float,
    eps: float,
    lr_placement: Literal["inside", "outside"],
    momentum_correction: bool,
    denominator: Literal["sum", "joint"],
    clip_ratio: bool,
    adapt: bool,
    maximize: bool,
    foreach: bool,
) -> None:
    """One LARS step, in place, on tensors of one device and dtype; see :class:`LARS`.

    ``buffers`` are v, zeros at first, or None at momentum 0. Gradients are left as they are.
    """
    outside = lr_placement == "outside" or momentum_correction
    inner, outer = (1.0, lr) if outside else (lr, 1.0)
    ratios = partial(
        lars_ratios,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        eps=eps,
        denominator=denominator,
        cap=lr if clip_ratio else None,
    )
    grads = torch._foreach_neg(grads) if maximize else grads
    if not foreach:
        for i, (w, g) in enumerate(zip(params, grads, strict=True)):
            d = g.add(w, alpha=weight_decay)
            d.mul_((ratios([w], [g], [d]) * inner)[0] if adapt else inner)
            if buffers is not None:
                v = buffers[i].mul_(momentum).add_(d)
                d = d.add_(v, alpha=momentum) if nesterov else v
            descend([w], [d], outer)
        return
    ds: Tensors = torch._foreach_add(grads, params, alpha=weight_decay)
    if adapt:
        torch._foreach_mul_(ds, (ratios(params, grads, ds) * inner).unbind())
    else:
        torch._foreach_mul_(ds, inner)
    if buffers is not None:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, ds)
        ds = torch._foreach_add(ds, buffers, alpha=momentum) if nesterov else buffers
    descend(params, ds, outer)
