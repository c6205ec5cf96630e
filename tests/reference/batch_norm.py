"""Batch norm as the textbooks have it, group by group."""

from __future__ import annotations

import torch
from torch import Tensor


def groups_of(n: int, span: int) -> list[slice]:
    """Spans of consecutive samples; what is left over joins the last."""
    starts = [i * span for i in range(max(1, n // span))]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], n], strict=True)]


def moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance per channel, and the values they are taken over."""
    values = x.transpose(0, 1).flatten(1)
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().mean(1), values.shape[1]


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, *, span: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the sample-weighted means over the groups of mean and unbiased variance."""
    outputs, mean_sum, var_sum = [], torch.zeros_like(weight), torch.zeros_like(weight)
    shape = (1, -1, *[1] * (x.dim() - 2))
    for group in groups_of(len(x), span):
        mean, var, count = moments(x[group])
        normal = (x[group] - mean.view(shape)) / (var.view(shape) + eps).sqrt()
        outputs.append(normal * weight.view(shape) + bias.view(shape))
        mean_sum = mean_sum + len(x[group]) * mean
        var_sum = var_sum + len(x[group]) * var * count / (count - 1)
    return torch.cat(outputs), mean_sum / len(x), var_sum / len(x)
