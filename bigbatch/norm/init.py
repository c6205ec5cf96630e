"""Residual branches that start as zero."""

from __future__ import annotations

from torch import nn

# The last norm of the residual branch in torchvision's blocks, by the block's class name.
LAST_NORM = {"BasicBlock": "bn2", "Bottleneck": "bn3"}


def zero_init_residual(model: nn.Module) -> list[str]:
    """γ = 0 in the last norm of every residual branch, so that each block starts as its shortcut alone.

    Goyal et al. 2017, arXiv:1706.02677, section 5.1. A block is a module with a method ``zero_init_last()`` (timm's
    and bigbatch's), or torchvision's BasicBlock or Bottleneck. Returns the names of the parameters set to zero.
    Raises ValueError where there are none.
    """
    names: list[str] = []
    for prefix, block in model.named_modules():
        before = {name: parameter._version for name, parameter in block.named_parameters()}
        last = getattr(block, LAST_NORM.get(type(block).__name__, ""), None)
        weight = getattr(last, "weight", None)
        if callable(zero := getattr(block, "zero_init_last", None)):
            zero()
        elif isinstance(weight, nn.Parameter):
            nn.init.zeros_(weight)
        written = [name for name, parameter in block.named_parameters() if parameter._version != before[name]]
        names += [f"{prefix}.{name}" if prefix else name for name in written]
    if not names:
        raise ValueError(
            "norm.zero_init_residual = true: the model has no residual block whose last norm is known "
            "(a method zero_init_last(), or torchvision's BasicBlock and Bottleneck); remove it"
        )
    return names
