"""A small residual network for images of 8 to 32 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """y = ReLU(F(x) + S(x)), F = conv 3×3 of stride s → norm → ReLU → conv 3×3 → norm.

    He et al. 2015, arXiv:1512.03385. S is the identity, or a 1×1 convolution of stride s where the shape changes.
    Differs from the paper: no norm in S.
    (B, inputs, H, W) → (B, outputs, ⌈H/s⌉, ⌈W/s⌉).
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y: Tensor = self.relu(residual + self.shortcut(x))
        return y

    def zero_init_last(self) -> None:
        """γ = 0 in the last norm, so that F starts as 0 (Goyal et al. 2017, arXiv:1706.02677, section 5.1)."""
        nn.init.zeros_(self.norm2.weight)


class ResNetSmall(nn.Module):
    """Conv 3×3 → norm → ReLU, ``blocks`` residual blocks for each of ``widths``, global average pool, linear head.

    Every width after the first halves the resolution. ``stem_stride`` "auto" is 1 for images smaller than 16 pixels and
    2 otherwise. Convolutions start as He et al. 2015 (arXiv:1502.01852, fan-out), the head as N(0, 1/fan-in) with
    bias 0. No bias stands before a norm. (B, C, H, W) → logits (B, classes).

    Raises ValueError for options that make no network.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        classes: int,
        widths: Sequence[int] = (16, 32, 64),
        stem_stride: int | Literal["auto"] = "auto",
        blocks: int = 1,
    ) -> None:
        super().__init__()
        if isinstance(widths, str) or not isinstance(widths, Sequence) or not widths or not all(map(_positive, widths)):
            raise ValueError(f"widths = {widths!r}: give the channels of each stage, such as [16, 32, 64]")
        if stem_stride != "auto" and not _positive(stem_stride):
            raise ValueError(f"stem_stride = {stem_stride!r}: give auto, 1 or 2")
        if not _positive(blocks):
            raise ValueError(f"blocks = {blocks!r}: give the number of blocks of each stage, 1 or more")
        channels, *size = shape
        stride = stem_stride if isinstance(stem_stride, int) else 1 if min(size) < 16 else 2
        self.conv = nn.Conv2d(channels, widths[0], 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        inputs = (widths[0], *widths)
        self.stages = nn.Sequential(
            *(
                ResidualBlock(inputs[i] if b == 0 else width, width, stride=2 if i > 0 and b == 0 else 1)
                for i, width in enumerate(widths)
                for b in range(blocks)
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # Layer-wise rates are relative to the weight: from Goyal et al.'s std of 0.01 the head of so narrow a network
        # would take a tenth of a short run to grow.
        nn.init.normal_(self.head.weight, std=widths[-1] ** -0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        logits: Tensor = self.head(self.pool(self.stages(x)).flatten(1))
        return logits


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
