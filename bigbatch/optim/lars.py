"""Layer-wise adaptive rate scaling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .layerwise import Bucket, Group, Kernel, LayerwiseOptimizer, Params, Update, descend, require
from .trust import joint_square, lars_ratio, square, squares

if TYPE_CHECKING:
    from .triton import Table


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
    a step capturable. kernel, low_precision and layers in pieces: see :class:`LayerwiseOptimizer`. Raises ValueError
    for illegal options.
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
        kernel: Kernel = "auto",
        low_precision: Literal["master", "stochastic"] = "master",
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

    def _moments(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _fused(self, bucket: Bucket) -> None:
        group, lr = bucket.group, float(bucket.group["lr"])
        inner, outer, ratio = *_placed(group, lr), _ratio(group, lr)
        ws, gs, vs = (bucket.tensors[name] for name in ("w", "g", "momentum_buffer"))
        if not group["adapt"]:
            _momentum_step(ws, gs, vs, inner, outer, group)
            return
        beta, joint = group["weight_decay"] * (-1 if group["maximize"] else 1), group["denominator"] == "joint"
        for i, (w, g) in enumerate(zip(ws, gs, strict=True)):
            local = ratio(square(w), square(g), joint_square(g, w, beta) if joint else None)
            _momentum_step([w], [g], vs[i : i + 1], local * inner, outer, group)

    def _foreach(self, bucket: Bucket) -> Update:
        group, lr = bucket.group, bucket.lr()
        inner, outer, ratio = *_placed(group, lr), _ratio(group, lr)
        w, g, v, d = (bucket.tensors[name] for name in ("w", "g", "momentum_buffer", "scratch"))
        torch._foreach_copy_(d, g)
        if group["maximize"]:
            torch._foreach_neg_(d)
        torch._foreach_add_(d, w, alpha=group["weight_decay"])
        if group["adapt"]:
            wanted = [squares(w), squares(g)] + ([squares(d)] if group["denominator"] == "joint" else [])
            whole = yield torch.stack(wanted)
            w2, g2, d2 = (*whole, None)[:3]
            torch._foreach_mul_(d, (ratio(w2, g2, d2) * inner).to(w[0].dtype).unbind())
        else:
            torch._foreach_mul_(d, inner)
        if v:
            torch._foreach_mul_(v, group["momentum"])
            torch._foreach_add_(v, d)
            if group["nesterov"]:
                torch._foreach_add_(d, v, alpha=group["momentum"])
        descend(w, d if group["nesterov"] or not v else v, outer, scratch=d)

    def _triton(self, bucket: Bucket, table: Table) -> Update:
        from .triton import lars_squares, lars_step

        group, lr, sign = bucket.group, bucket.lr(), -1 if bucket.group["maximize"] else 1
        beta, joint = sign * group["weight_decay"], group["denominator"] == "joint"
        inner, outer, ratio = *_placed(group, lr), _ratio(group, lr)
        ratios = table.ones
        if group["adapt"]:
            whole = yield table.squares(lars_squares, 2 + joint, beta, JOINT=joint)
            ratios = ratio(*(*whole, None)[:3])
        switches = {"MOMENTUM": group["momentum"] > 0, "NESTEROV": group["nesterov"]}
        table.launch(lars_step, ratios * inner * sign, table.ones * outer, group["momentum"], beta, **switches)


def _placed(group: Group, lr: Any) -> tuple[Any, Any]:
    """The factors of λ(g + βw) on its way into the buffer and of the buffer on its way into the weights."""
    outside = group["lr_placement"] == "outside" or group["momentum_correction"]
    return (1.0, lr) if outside else (lr, 1.0)


def _ratio(group: Group, lr: float | Tensor) -> Callable[..., Any]:
    options = {key: group[key] for key in ("weight_decay", "trust_coefficient", "eps")}
    return partial(lars_ratio, cap=lr if group["clip_ratio"] else None, **options)


def _momentum_step(w: list[Tensor], g: list[Tensor], v: list[Tensor], inner: float, outer: float, group: Group) -> None:
    """v ← m v + a, a = inner·(g + βw); w ← w − outer·v, with Nesterov's look ahead w ← w − outer·(a + m v).

    torch's kernel does this in one pass over memory, its dampening being 1 − inner; 1 − (1 − inner) is off by 2⁻⁵⁴, and
    where that would show it takes several passes. Looking ahead is two kernels: w ← w − outer·m v / keep, and then
    w ← w − outer·inner·(g + βw), which shrinks what is there by keep = 1 − outer·inner·β.
    """
    m, beta, maximize = group["momentum"], group["weight_decay"], group["maximize"]
    sgd = partial(torch._fused_sgd_, weight_decay=beta, nesterov=False, maximize=maximize, is_first_step=False)
    exact = inner > (2**-10 if w[0].dtype == torch.float64 else 2**-26)
    keep = 1 - outer * inner * beta
    if not v:
        sgd(w, g, [], momentum=0.0, lr=outer * inner, dampening=0.0)
    elif exact and not group["nesterov"]:
        sgd(w, g, v, momentum=m, lr=outer, dampening=1 - inner)
    elif exact and keep > 0.5:
        sgd(w, g, v, momentum=m, lr=outer * m / keep, dampening=1 - inner)
        sgd(w, g, [], momentum=0.0, lr=outer * inner, dampening=0.0)
    else:
        ascent = -inner if maximize else inner
        torch._foreach_mul_(v, m)
        torch._foreach_add_(v, g, alpha=ascent)
        torch._foreach_add_(v, w, alpha=inner * beta)
        if group["nesterov"]:
            torch._foreach_mul_(w, keep)
            torch._foreach_add_(w, g, alpha=-outer * ascent)
        torch._foreach_add_(w, v, alpha=-outer * (m if group["nesterov"] else 1))
