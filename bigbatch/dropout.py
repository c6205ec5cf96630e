"""Dropout and stochastic depth whose masks belong to a sample of a step, not to a process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bigbatch.keyed import hashed

_CHANNELS = (F.dropout1d, F.dropout2d, F.dropout3d)


class KeyedDropout(TorchFunctionMode):
    """Inside ``with keyed.at(piece, window):`` dropout draws from (seed, k, position, j), whatever the layout.

    k counts the draws of the forward pass, the position is the sample's in the stream (which tells the step and the
    place in the global batch), j is the element within the sample. So a mask does not depend on how the global batch is
    cut. A draw that has no dimension of samples (dropout inside a relative-position bias) has the window's first
    position, one mask for the whole step; `learn` finds out which those are.

    Taken over: nn.Dropout, Dropout1d/2d/3d and their functions, ``Tensor.bernoulli_`` (timm's and torchvision's
    stochastic depth), and the dropout of ``scaled_dot_product_attention``, which is then computed by its formula, in
    memory quadratic in the length. The first dimension must be the samples, or samples × parts with the parts of a
    sample next to each other. Whatever else draws random numbers (AlphaDropout, nn.MultiheadAttention, recurrent
    layers, activation checkpointing in its second forward pass) still does so from torch's generator: `draws_freely`
    tells.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._piece = self._window = range(0)
        self._draw = 0
        self._whole: set[int] = set()
        self._rows: list[int] | None = None

    def at(self, piece: range, window: range) -> KeyedDropout:
        """For a forward pass over the samples at ``piece`` of the step whose samples are at ``window``, positions in
        the stream; an empty piece stands for one dummy sample."""
        self._piece, self._window, self._draw = piece or range(piece.start, piece.start + 1), window, 0
        return self

    def learn(self, forward: Callable[[int], Any]) -> None:
        """Find out which draws are for the whole batch, from ``forward`` passes of 2 and of 3 samples."""
        rows = []
        for samples in (2, 3):
            self._rows = []
            with self.at(range(samples), range(samples)):
                forward(samples)
            rows.append(self._rows)
        self._rows = None
        self._whole = {k for k, (two, three) in enumerate(zip(*rows, strict=False), 1) if two * 3 != three * 2}

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func in _CHANNELS:
            return self._dropout(*args, **{**kwargs, "by_channel": True})
        if func is Tensor.bernoulli_:
            return self._bernoulli(*args, **kwargs)
        if func is F.scaled_dot_product_attention and (kwargs.get("dropout_p") or any(args[4:5])):
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, by_channel: bool = False
    ) -> Tensor:
        """y = x·m/(1 - p), m = 1 with probability 1 - p, for each element or each channel."""
        if not training or p == 0:
            return x
        shape = x.shape[:2] if by_channel else x.shape
        mask = self._keep(shape, 1 - p, x.device).view(*shape, *[1] * (x.dim() - len(shape))).to(x.dtype)
        mask = mask.mul_(1 / (1 - p) if p < 1 else 0.0)
        return x.mul_(mask) if inplace else x * mask

    def _bernoulli(self, x: Tensor, p: float = 0.5, *, generator: None = None) -> Tensor:
        if isinstance(p, Tensor) or generator is not None:
            return x.bernoulli_(p, generator=generator)
        return x.copy_(self._keep(x.shape, p, x.device))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """dropout(softmax(QKᵀ·scale + mask))·V, scale = 1/√d unless given."""
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
        # Both are scaled before the product, which else overflows in half precision.
        root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        scores = (query * root) @ (key * root).transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is None:
            return self._dropout(scores.softmax(-1), dropout_p) @ value
        blocked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if blocked else scores + attn_mask
        # A query that may look at nothing gets 0.
        nothing = scores.isneginf().all(-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
        return self._dropout(weights, dropout_p) @ value

    def _keep(self, shape: torch.Size, probability: float, device: torch.device) -> Tensor:
        """Booleans of this shape, true with this probability, to a multiple of 2⁻³²."""
        self._draw += 1
        if self._rows is not None:
            self._rows.append(shape[0] if shape else 1)
        piece = self._piece
        if self._draw in self._whole or (self._rows is not None and (not shape or shape[0] % len(piece))):
            piece = range(self._window.start, self._window.start + 1)
        elif not shape or not shape[0] or shape[0] % len(piece):
            raise ValueError(
                f"task.dropout = keyed: dropout of {tuple(shape)} in a batch of {len(piece)} samples, whose first "
                "dimension does not tell the samples apart; set task.dropout=torch, or the model's dropout to 0"
            )
        each = math.prod(shape) // len(piece)
        # One hash is two draws of 32 bits.
        place = torch.arange(piece.start, piece.stop, device=device)[:, None]
        words = hashed(self._seed, self._draw, place, torch.arange((each + 1) // 2, device=device))
        highest = max(round(probability * 2**32) - 1, 0) - 2**31
        return (words.view(torch.int32)[:, :each] <= highest).view(shape)


def draws_freely(forward: Callable[[], Any], device: torch.device) -> bool:
    """Whether a forward pass takes numbers from torch's own generators; leaves them as they were."""
    on_gpu = device.type == "cuda"

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]

    before = states()
    forward()
    drawn = any(not torch.equal(a, b) for a, b in zip(before, states(), strict=True))
    torch.set_rng_state(before[0])
    if on_gpu:
        torch.cuda.set_rng_state(before[1], device)
    return drawn
