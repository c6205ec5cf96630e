"""SplitMix64 as its authors define it: a generator with a state."""

from __future__ import annotations

MASK = (1 << 64) - 1


def outputs(seed, count):
    state, result = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        result.append(z ^ (z >> 31))
    return result
