"""Mixup and CutMix: a sample of a window mixed with its neighbour, the same however the window is cut."""

from __future__ import annotations

import torch
from torch import Tensor

from bigbatch.config.models import Augment
from bigbatch.keyed import uniform

from .augment import inside

_KIND, _SHARE, _Y, _X = range(4)
_DRAWS = torch.arange(8, 12)[:, None]  # those before are augment.py's


def partners(positions: range, window: range) -> tuple[range, Tensor]:
    """Positions to load, and where among them each of ``positions`` finds its partner, int64 (B,).

    The p-th of the window, counted from 0, has p ⊕ 1 for a partner; the last of an odd window has the one before it,
    and a lone sample itself. So at most two are loaded besides one's own. No positions stand for one lone sample.
    """
    if not positions:
        return positions, torch.zeros(1, dtype=torch.int64)
    own = torch.arange(positions.start - window.start, positions.stop - window.start)
    other = torch.where((own ^ 1) < len(window), own ^ 1, (own - 1).clamp(min=0))
    low, high = (int(t) for t in torch.cat([own, other]).aminmax())
    return range(window.start + low, window.start + high + 1), other - low


def mix_images(
    image: Tensor, other: Tensor, *, config: Augment, seed: int, epoch: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Images mixed with their partners', and the share of their own in each, (B,), a function of (seed, epoch, index):

    x̃ = m ⊙ x + (1 - m) ⊙ x', ỹ = s·y + (1 - s)·y', λ ~ Beta(α, α)

    - ``mixup`` (Zhang et al. 2018, arXiv:1710.09412): m = s = λ everywhere.
    - ``cutmix`` (Yun et al. 2019, arXiv:1905.04899): m is 0 in a box of ⌊H√(1-λ)⌋ × ⌊W√(1-λ)⌋ around a uniform pixel,
      cut to the image, and 1 elsewhere; s is the mean of m.

    With both, each sample takes one of them with probability 1/2. Differs from the papers: partners are neighbours in
    the window, which is in random order, and not a permutation of the batch; a sample draws its own λ and box, where
    the papers' code draws one for the batch. λ is Beta's inverse distribution function at a keyed draw.

    image, other: (B, C, H, W), float, normalised, both overwritten; epoch, index: int64 (B,), on the CPU.
    """
    u = uniform(seed, epoch, index, draw=_DRAWS)
    kinds = [make(u, alpha, image) for make, alpha in ((_mixup, config.mixup), (_cutmix, config.cutmix)) if alpha]
    mask, share = kinds[0]
    if len(kinds) == 2:
        first = (u[_KIND] < 0.5).to(image.device)
        mask = torch.where(first[:, None, None, None], mask, kinds[1][0])
        share = torch.where(first, share, kinds[1][1])
    return image.mul_(mask).add_(other.mul_(1 - mask)), share


def _mixup(u: Tensor, alpha: float, image: Tensor) -> tuple[Tensor, Tensor]:
    share = _beta(u, alpha).to(image)
    return share[:, None, None, None], share


def _cutmix(u: Tensor, alpha: float, image: Tensor) -> tuple[Tensor, Tensor]:
    h, w = image.shape[2:]
    root = (1 - _beta(u, alpha)).sqrt()
    rows, columns = (
        inside(side, start=(u[centre] * side).floor() - (extent / 2).floor(), extent=extent)
        for side, centre, extent in ((h, _Y, (h * root).floor()), (w, _X, (w * root).floor()))
    )
    share = 1 - (rows.sum(1) * columns.sum(1)).double() / (h * w)
    return 1 - rows.to(image)[:, None, :, None] * columns.to(image)[:, None, None, :], share.to(image)


def _beta(u: Tensor, alpha: float) -> Tensor:
    from scipy.special import betaincinv  # slow to import, and seldom needed

    return torch.from_numpy(betaincinv(alpha, alpha, u[_SHARE].numpy()))
