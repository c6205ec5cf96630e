"""What a dataset tells the task that learns from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

IGNORED = -100
"""The label of a token that is not to be predicted, as torch's cross entropy has it."""


@dataclass(frozen=True)
class Spec:
    """Of every sample of a dataset, as the model gets it.

    shape: (C, H, W) of an image, (L,) of a row of tokens. classes: of labels, or tokens in the vocabulary; 0
    where there are none. names: of the classes, where they have any. special: ids of tokens that are no text, such as
    ``pad`` and ``mask``.
    """

    shape: tuple[int, ...]
    classes: int = 0
    names: tuple[str, ...] = ()
    special: Mapping[str, int] = field(default_factory=dict)
