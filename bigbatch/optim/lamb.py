"""Layer-wise adaptive moments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .layerwise import Bucket, Group, Kernel, LayerwiseOptimizer, Params, Update, descend, require
from .trust import CHUNK, Tensors, flat, lamb_ratio, square, squares

if TYPE_CHECKING:
    from .triton import Table


class LAMB(LayerwiseOptimizer):
    """LAMB (You et al. 2019, arXiv:1904.00962).

    For each layer with weights w, gradient g, rate γ and weight decay λ, at this layer's t-th step::

        m ← β₁m + (1−β₁)g;   v ← β₂v + (1−β₂)g²
        r = m̂ / (√v̂ + ε),   m̂ = m/(1−β₁ᵗ),  v̂ = v/(1−β₂ᵗ)    (bias_correction False: m̂ = m, v̂ = v)
        u = r + λw;          w ← w − γ (φ(‖w‖)/‖u‖) u

    The trust ratio φ(‖w‖)/‖u‖ is 1 where a norm is 0. φ is the identity, or min(z, clamp_weight_norm). A group with
    ``adapt=False`` has ratio 1, which is AdamW: w ← (1−γλ)w − γr.

    prenormalize (NVIDIA's LAMB): g is first divided by the L2 norm of all gradients this optimiser holds, over all
    groups, whether that norm is above or below 1; nothing is divided where it is 0. Off by default.

    Differs from the paper: φ is unclamped unless asked.

    lr may be a 0-dim tensor, best on the parameters' device. capturable keeps the step counters there too, so that
    a step reads nothing from the host (needed, with a device lr, in a CUDA graph). kernel, low_precision and layers in
    pieces: see :class:`LayerwiseOptimizer`. Raises ValueError for illegal options.
    """

    counts_steps = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        clamp_weight_norm: float | None = None,
        prenormalize: bool = False,
        adapt: bool = True,
        maximize: bool = False,
        kernel: Kernel = "auto",
        low_precision: Literal["master", "stochastic"] = "master",
        capturable: bool = False,
    ) -> None:
        defaults = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        super()._check(group)
        require(all(0 <= beta < 1 for beta in group["betas"]), "betas", group, "give two numbers in [0, 1)")
        clamp = group["clamp_weight_norm"]
        require(clamp is None or clamp > 0, "clamp_weight_norm", group, "give a number > 0, or None for no clamp")

    def _moments(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _fused(self, bucket: Bucket) -> None:
        group, lr = bucket.group, float(bucket.group["lr"])
        ws, gs, ms, vs = (bucket.tensors[name] for name in ("w", "g", "exp_avg", "exp_avg_sq"))
        steps = bucket.steps if group["bias_correction"] else [torch.tensor(math.inf)] * len(ws)
        clamp, divisor = group["clamp_weight_norm"], 1.0
        if bucket.gradient_norm is not None:
            divisor = bucket.gradient_norm.item() or 1.0
        if not group["adapt"] and divisor == 1.0:
            _adamw(ws, gs, ms, vs, steps, lr, group["weight_decay"], group)
            return
        for batch in _batches(ws):
            w, g, m, v = ([flat(tensors[i]) for i in batch] for tensors in (ws, gs, ms, vs))
            u = self._flat("update", w)
            w2, u2 = [0.0] * len(w), [0.0] * len(w)
            for w_, g_, m_, v_, u_ in _pieces(w, g, m, v, u):
                if divisor != 1.0:
                    scaled = self._flat("scaled", g_)
                    torch._foreach_copy_(scaled, g_)
                    torch._foreach_div_(scaled, divisor)
                    g_ = scaled
                # On a copy of w, at the rate −1 and the decay λ − 1, the kernel leaves (1 + λ − 1)w + r, which is u.
                torch._foreach_copy_(u_, w_)
                _adamw(u_, g_, m_, v_, [steps[i] for i in batch], -1.0, group["weight_decay"] - 1, group)
                for i, (x, y) in enumerate(zip(w_, u_, strict=True)):
                    w2[i] += square(x)
                    u2[i] += square(y)
            ratios = [lamb_ratio(*norms, clamp=clamp) if group["adapt"] else 1.0 for norms in zip(w2, u2, strict=True)]
            for x, y, ratio in zip(w, u, ratios, strict=True):
                x.add_(y, alpha=-lr * ratio)

    def _foreach(self, bucket: Bucket) -> Update:
        group, (beta1, beta2) = bucket.group, bucket.group["betas"]
        w, g, m, v, u = (bucket.tensors[name] for name in ("w", "g", "exp_avg", "exp_avg_sq", "scratch"))
        c1, c2 = (_correction(bucket.steps, beta if group["bias_correction"] else 0.0, w[0]) for beta in (beta1, beta2))
        torch._foreach_copy_(u, g)
        if group["maximize"]:
            torch._foreach_neg_(u)
        if bucket.gradient_norm is not None:
            norm = bucket.gradient_norm.to(w[0].device)
            torch._foreach_div_(u, torch.where(norm == 0, 1.0, norm))
        torch._foreach_lerp_(m, u, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, u, u, 1 - beta2)
        torch._foreach_copy_(u, v)
        torch._foreach_sqrt_(u)
        torch._foreach_div_(u, c2.sqrt().unbind())
        torch._foreach_add_(u, group["eps"])
        torch._foreach_mul_(u, c1.unbind())
        torch._foreach_reciprocal_(u)
        torch._foreach_mul_(u, m)
        torch._foreach_add_(u, w, alpha=group["weight_decay"])
        if group["adapt"]:
            w2, u2 = yield torch.stack([squares(w), squares(u)])
            ratios = lamb_ratio(w2, u2, clamp=group["clamp_weight_norm"])
            torch._foreach_mul_(u, ratios.to(w[0].dtype).unbind())
        descend(w, u, bucket.lr(), scratch=u)

    def _triton(self, bucket: Bucket, table: Table) -> Update:
        from .triton import lamb_descent, lamb_moments

        group, (beta1, beta2), rates = bucket.group, bucket.group["betas"], table.ones * bucket.lr()
        divisor = -table.ones[:1] if group["maximize"] else table.ones[:1]
        if bucket.gradient_norm is not None:
            norm = bucket.gradient_norm.to(divisor.device)
            divisor = divisor * torch.where(norm == 0, 1.0, norm)
        w, on = bucket.tensors["w"][0], group["bias_correction"]
        c1, c2 = (_correction(bucket.steps, beta if on else 0.0, w) for beta in (beta1, beta2))
        of_update = (c1, c2, group["eps"], group["weight_decay"])
        of_moments = (rates, divisor, beta1, beta2, *of_update)
        if not group["adapt"]:
            table.launch(lamb_moments, table.partials, *of_moments, ADAPT=False)
            return
        w2, u2 = yield table.squares(lamb_moments, 2, *of_moments, ADAPT=True)
        table.launch(lamb_descent, rates * lamb_ratio(w2, u2, clamp=group["clamp_weight_norm"]), *of_update)

    def _flat(self, name: str, like: Tensors) -> list[Tensor]:
        """Tensors of the sizes of these, one after the other in memory that lasts."""
        sizes, dtype = [t.numel() for t in like], like[0].dtype
        held = self._scratch.get((name, dtype))
        if held is None or len(held) < sum(sizes):
            held = self._scratch[name, dtype] = torch.empty(sum(sizes), dtype=dtype)
        return list(held[: sum(sizes)].split_with_sizes(sizes))


def _batches(tensors: Tensors) -> list[list[int]]:
    """The tensors' places, in runs that are a chunk at most together, or of one larger tensor: a call costs as much as
    many elements."""
    batches: list[list[int]] = []
    room = 0
    for i, tensor in enumerate(tensors):
        if not batches or tensor.numel() > room:
            batches.append([])
            room = CHUNK
        batches[-1].append(i)
        room -= tensor.numel()
    return batches


def _pieces(*ways: list[Tensor]) -> Iterable[tuple[list[Tensor], ...]]:
    """A batch as it is, or the chunks of its only tensor."""
    if len(ways[0]) > 1:
        return [ways]
    return zip(*([[part] for part in torch.split(way[0], CHUNK)] for way in ways), strict=True)


def _adamw(
    w: Tensors, g: Tensors, m: Tensors, v: Tensors, steps: Tensors, lr: float, weight_decay: float, group: Group
) -> None:
    torch._fused_adamw_(
        w, g, m, v, [], steps, lr=lr, beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=weight_decay,
        eps=group["eps"], amsgrad=False, maximize=group["maximize"],
    )  # fmt: skip


def _correction(steps: Tensors, beta: float, like: Tensor) -> Tensor:
    """1 − βᵗ for each count t, shape (N,). By expm1: in float32 the difference loses its digits for β near 1."""
    t = torch.stack(list(steps)).to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
    return -torch.expm1(t * (math.log(beta) if beta else -math.inf))
