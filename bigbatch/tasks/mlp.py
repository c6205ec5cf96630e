"""A perceptron of several layers, for vectors such as PCA's, and for images taken as such."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear → ReLU → dropout for each of ``widths``, and a linear head. (B, …) of ``shape`` → logits (B, classes).

    Raises ValueError for options that make no network.
    """

    def __init__(
        self, *, shape: tuple[int, ...], classes: int, widths: Sequence[int] = (256, 256), dropout: float = 0.0
    ) -> None:
        super().__init__()
        if isinstance(widths, str) or not all(isinstance(width, int) and width > 0 for width in widths):
            raise ValueError(f"widths = {widths!r}: give the features of each hidden layer, such as [256, 256]")
        layers: list[nn.Module] = [nn.Flatten()]
        inputs = math.prod(shape)
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
            inputs = width
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x))
        return logits
