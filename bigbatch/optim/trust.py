"""Layer norms and trust ratios: the only place where the optimisers take norms, but for the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]
Number = TypeVar("Number", float, Tensor)

# Elements. Few enough for a chunk to stay in a shared cache between kernels and for a float32 dot product to keep its
# digits (on random numbers its error is up to 7e-6 here and 2e-4 at 2²⁴; torch's vector_norm on the CPU: 2e-3), and
# enough to make little of what a call and the threads' meeting cost.
CHUNK = 1 << 20


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory: a view of shape (n,)."""
    if tensor.ndim == 1:
        return tensor
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The elements of dense tensors of one layout in the order of memory, CHUNK of each at a time."""
    whole = tuple(flat(t) for t in tensors)
    size = whole[0].numel()
    if size <= CHUNK:
        yield whole
    else:
        for start in range(0, size, CHUNK):
            yield tuple(t[start : start + CHUNK] for t in whole)


def square(tensor: Tensor) -> float:
    """‖·‖² of a dense CPU tensor of float32 or float64."""
    x = flat(tensor)
    if x.numel() <= CHUNK:
        return torch.dot(x, x).item()
    return sum(torch.dot(part, part).item() for part in torch.split(x, CHUNK))


def joint_square(g: Tensor, w: Tensor, weight_decay: float) -> float:
    """‖g + βw‖² for dense CPU tensors of one layout."""
    whole = 0.0
    for x, y in chunks(g, w):
        d = x.add(y, alpha=weight_decay)
        whole += torch.dot(d, d).item()
    return whole


def squares(tensors: Tensors) -> Tensor:
    """‖·‖² of N dense tensors of one device and dtype, shape (N,): float64 on the CPU, else the tensors' dtype.

    Tensors are of float32 or float64; there is no host sync on a GPU.
    """
    if tensors[0].device.type == "cpu":
        return torch.tensor([square(t) for t in tensors], dtype=torch.float64)
    return torch.stack(torch._foreach_norm(tensors, 2)).square()


def lars_ratio(
    w: Number, g: Number, d: Number | None, *, weight_decay: float, trust_coefficient: float, eps: float,
    cap: Number | float | None,
) -> Number:  # fmt: skip
    """λ = η‖w‖ / (‖g‖ + β‖w‖ + ε) from ‖w‖² and ‖g‖², numbers or tensors of one shape.

    With d = ‖g + βw‖² the denominator is ‖g + βw‖ + ε. With ``cap`` = γ the ratio is min(λ/γ, 1), so that the layer's
    rate γ·ratio is min(λ, γ). The ratio is 1 where ‖w‖, ‖g‖ or the denominator is 0. Non-finite norms stay visible.
    """
    below = (g**0.5 + weight_decay * w**0.5 if d is None else d**0.5) + eps
    undefined = (w == 0) | (g == 0) | (below == 0)
    ratio: Number = trust_coefficient * w**0.5 / (below + undefined)
    if cap is not None:
        ratio = _where(ratio >= cap, 1.0, ratio / (cap + (cap == 0)))
    ratio = _where(undefined, 1.0, ratio)
    return ratio


def lamb_ratio(w: Number, u: Number, *, clamp: float | None) -> Number:
    """φ(‖w‖)/‖u‖ from ‖w‖² and ‖u‖², φ(z) = min(z, clamp); 1 where a norm is 0."""
    undefined = (w == 0) | (u == 0)
    top = w**0.5 if clamp is None else _where(w > clamp**2, clamp, w**0.5)
    ratio: Number = _where(undefined, 1.0, top / (u**0.5 + undefined))
    return ratio


def _where(condition: bool | Tensor, yes: float, no: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no
