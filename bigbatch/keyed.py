"""Randomness by counter: a draw is a hash of what it belongs to (seed, epoch, sample), so it has no history.

h(k₁, …, kₙ) is built key by key from h() = 0: h(…, k) is output number k of the SplitMix64 generator (Steele, Lea and
Flood 2014, "Fast splittable pseudorandom number generators") whose state is h(…). Every key is thus mixed by an
avalanching bijection of 64 bits: neighbouring samples, epochs and draws are as unrelated as random numbers are.
Good enough for augmentation and seeding, and tested for mean, variance, χ² and correlation; not cryptographic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_GAMMA, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def hashed(*keys: int | Tensor) -> Tensor:
    """h(keys) as an int64 tensor of the keys' broadcast shape, on their device; at least one key is an int64 tensor."""
    state: int | Tensor = 0
    for key in keys:
        step = (key + 1) * (_signed(_GAMMA) if isinstance(key, Tensor) else _GAMMA)
        if isinstance(state, int) and isinstance(step, int):
            state = _mix_int(state + step)
        else:
            state = _mix_tensor(_signed(state) + _signed(step))
    assert isinstance(state, Tensor)
    return state


def uniform(*keys: int | Tensor, draw: int | Tensor) -> Tensor:
    """Number ``draw`` of the draws that belong to ``keys``: float64 in [0, 1), a multiple of 2⁻⁵³.

    Keys and draws are integers and int64 tensors, at least one a tensor; the result has their broadcast shape.
    """
    return _shift(hashed(*keys, draw), 11).double() * 2.0**-53


def fold(seed: int, *keys: int) -> int:
    """The upper 63 bits of h(seed, keys), to seed a ``torch.Generator`` with."""
    state = 0
    for key in (seed, *keys):
        state = _mix_int(state + (key + 1) * _GAMMA)
    return state >> 1


def _mix_int(z: int) -> int:
    z &= _WORD
    z = (z ^ z >> 30) * _M1 & _WORD
    z = (z ^ z >> 27) * _M2 & _WORD
    return z ^ z >> 31


def _mix_tensor(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_M1)
    z = (z ^ _shift(z, 27)) * _signed(_M2)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own drags the sign along."""
    return z >> bits & (1 << 64 - bits) - 1


def _signed(value: int | Tensor) -> Any:
    """A Python integer as the int64 that has its lowest 64 bits; tensors already wrap around."""
    return value if isinstance(value, Tensor) else (value + (1 << 63)) % (1 << 64) - (1 << 63)
