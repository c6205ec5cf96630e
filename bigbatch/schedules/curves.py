"""Decay curves: pure functions that give the share of the peak rate.

``p`` is the share of the decay that has passed, in [0, 1]; ``s`` counts samples.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence


def linear(p: float, *, end: float = 0.0) -> float:
    """1 − (1 − end)·p."""
    return 1.0 - (1.0 - end) * p


def cosine(p: float, *, end: float = 0.0) -> float:
    """end + (1 − end)·(1 + cos πp)/2 (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts)."""
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * p))


def poly(p: float, *, power: float = 2.0, end: float = 0.0) -> float:
    """end + (1 − end)·(1 − p)^power; power 2 is the usual companion of LARS (You et al. 2017, arXiv:1708.03888)."""
    return float(end + (1.0 - end) * (1.0 - p) ** power)


def step(s: int, *, every: int, factor: float, grown: int = 0) -> float:
    """factor^⌊s / every⌋; the first ``grown`` milestones grow the batch and leave the rate."""
    return float(factor ** max(0, s // every - grown))


def multistep(s: int, *, at: Sequence[int], factor: float, grown: int = 0) -> float:
    """factor^(number of milestones reached); ``at`` in ascending samples, ``grown`` as for ``step``."""
    return float(factor ** max(0, bisect_right(at, s) - grown))


def exponential(s: int, *, every: int, factor: float) -> float:
    """factor^(s / every)."""
    return float(factor ** (s / every))


def inverse_time(s: int, *, every: int, rate: float) -> float:
    """1 / (1 + rate·s / every)."""
    return 1.0 / (1.0 + rate * s / every)


def one_cycle(s: int, *, up: int, total: int, start: float, end: float) -> float:
    """Cosine rise from ``start`` to 1 over ``up`` samples, cosine fall to ``end``.

    Smith & Topin 2017, arXiv:1708.07120. Differs from the paper: cosine instead of straight flanks, no third phase,
    momentum is not cycled.
    """
    if s < up:
        return cosine(1.0 - s / up, end=start)
    return cosine((s - up) / (total - up), end=end)


def warm_restarts(s: int, *, first: int, multiply: float = 1.0, end: float = 0.0) -> float:
    """Cosine cycles; the first takes ``first`` samples, each next one ``multiply`` times the one before (SGDR).

    Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, with T_mult = multiply and η_min = end.
    """
    position, length = float(s), float(first)
    if multiply == 1.0:
        position %= length
    while position >= length:
        position -= length
        length *= multiply
    return cosine(position / length, end=end)
