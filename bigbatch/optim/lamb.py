"""Layer-wise adaptive moments."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from .layerwise import Group, LayerwiseOptimizer, Params, descend, gradients, rate_and_path, require
from .trust import Tensors, global_norm, lamb_ratios

_OPTIONS = ("betas", "eps", "weight_decay", "bias_correction", "clamp_weight_norm", "adapt", "maximize")


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
    a step reads nothing from the host (needed, with a device lr, in a CUDA graph). Norms and bias corrections are
    float32 (float64 for float64 weights); m and v have the weight's dtype. foreach None: all layers of a device at
    once unless on the CPU. Raises ValueError for illegal options.
    """

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
        foreach: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        super()._check(group)
        require(all(0 <= beta < 1 for beta in group["betas"]), "betas", group, "give two numbers in [0, 1)")
        clamp = group["clamp_weight_norm"]
        require(clamp is None or clamp > 0, "clamp_weight_norm", group, "give a number > 0, or None for no clamp")

    def _update(self, buckets: list[tuple[Group, list[Tensor]]]) -> None:
        whole = None
        if any(group["prenormalize"] for group, _ in buckets):
            whole = global_norm(gradients(params) for _, params in buckets)
        for group, params in buckets:
            lamb(
                params,
                gradients(params),
                [self._state(p, "exp_avg") for p in params],
                [self._state(p, "exp_avg_sq") for p in params],
                [self._step_count(p, on_device=group["capturable"]) for p in params],
                gradient_norm=whole.to(params[0].device) if whole is not None and group["prenormalize"] else None,
                **{key: group[key] for key in _OPTIONS},
                **rate_and_path(group, params),
            )

    def _step_count(self, p: Tensor, *, on_device: bool) -> Tensor:
        state: dict[str, Tensor] = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
        return state["step"]


def lamb(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool,
    clamp_weight_norm: float | None,
    gradient_norm: Tensor | None,
    adapt: bool,
    maximize: bool,
    foreach: bool,
) -> None:
    """One LAMB step, in place, on tensors of one device and dtype; see :class:`LAMB`.

    ``exp_avgs`` and ``exp_avg_sqs`` are m and v, zeros at first; ``steps`` are 0-dim counts of the steps taken so
    far, raised by 1. Gradients, divided by ``gradient_norm`` where it is given, are left as they are.
    """
    torch._foreach_add_(steps, 1)
    c1, c2 = (_correction(steps, beta if bias_correction else 0.0, params[0]) for beta in betas)
    ratios = partial(lamb_ratios, clamp=clamp_weight_norm)
    grads = torch._foreach_neg(grads) if maximize else grads
    if gradient_norm is not None:
        grads = torch._foreach_mul(grads, 1.0)
        torch._foreach_div_(grads, torch.where(gradient_norm == 0, 1.0, gradient_norm))
    if not foreach:
        for i, (w, g) in enumerate(zip(params, grads, strict=True)):
            m = exp_avgs[i].lerp_(g, 1 - betas[0])
            v = exp_avg_sqs[i].mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
            u = m / v.sqrt().div_(c2[i].sqrt()).add_(eps).mul_(c1[i])
            u.add_(w, alpha=weight_decay)
            if adapt:
                u.mul_(ratios([w], [u])[0])
            descend([w], [u], lr)
        return
    torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - betas[1])
    below = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(below, c2.sqrt().unbind())
    torch._foreach_add_(below, eps)
    torch._foreach_mul_(below, c1.unbind())
    us = torch._foreach_div(exp_avgs, below)
    torch._foreach_add_(us, params, alpha=weight_decay)
    if adapt:
        torch._foreach_mul_(us, ratios(params, us).unbind())
    descend(params, us, lr)


def _correction(steps: Tensors, beta: float, like: Tensor) -> Tensor:
    """1 − βᵗ for each count t, shape (N,). By expm1: in float32 the difference loses its digits for β near 1."""
    t = torch.stack(list(steps)).to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
    return -torch.expm1(t * (math.log(beta) if beta else -math.inf))
