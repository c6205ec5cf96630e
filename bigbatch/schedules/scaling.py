"""How the learning rate follows the global batch."""

from __future__ import annotations

import math
from typing import Literal

Rule = Literal["linear", "sqrt", "none"]

SOURCES: dict[Rule, str] = {
    "linear": "Goyal et al. 2017, arXiv:1706.02677, section 2.1",
    "sqrt": "Krizhevsky 2014, arXiv:1404.5997; Hoffer et al. 2017, arXiv:1705.08741",
    "none": "recipe",
}


def lr_scale(rule: Rule, *, batch: int, base_batch: int) -> float:
    """Factor on the learning rate when the global batch goes from ``base_batch`` to ``batch`` samples.

    With k = batch / base_batch: ``linear`` gives k (k small steps on one point equal one of k times the rate),
    ``sqrt`` gives √k (which keeps the covariance of the update), ``none`` gives 1.
    """
    k = batch / base_batch
    return {"linear": k, "sqrt": math.sqrt(k), "none": 1.0}[rule]
