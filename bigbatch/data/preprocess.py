"""Preprocessing by statistics of the training part alone, as one affine map: rescale, centre, scale, whiten.

Of an image x of D features, the values of all its pixels and channels:

    x₁ = (x - low)/width           rescale: to [0, 1] or [-1, 1]
    x₂ = x₁ - mean(x₁)             center: over all features, those of a channel, or each for itself
    x₃ = x₂ / std(x₂)              scale: likewise
    y  = W x₃                      whiten, C = cov(x₃) = U Λ Uᵀ, the greatest eigenvalue first, k of them kept:
                                   PCA: W = (Λₖ + ε)^(-1/2) Uₖᵀ, y has k features; ZCA: W = Uₖ (Λₖ + ε)^(-1/2) Uₖᵀ

With ε = 0, cov(y) is the identity (of ZCA with k < rank C: the projection on what is kept). Of all such W that of ZCA
leaves y closest to x₃, and so an image (Bell and Sejnowski 1997, "The 'independent components' of natural scenes are
edge filters"; Krizhevsky 2009, "Learning multiple layers of features from tiny images", appendix A; Kessy, Lewin and
Strimmer 2018, arXiv:1512.00809). Moments are divided by n, the number of samples, where scikit-learn has n - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bigbatch.config.models import Preprocess

State = dict[str, Tensor]

LARGEST = 16_384
"""Features up to which they are whitened: a covariance takes 2 GB then."""

_MOST, _ORIGIN = 255, 128
"""The largest value that there can be, and what moments are taken about."""

_EXACT = 1024
"""Rows of uint8, less 128, whose squares add up to 2²⁴ at most: exactly, in float32."""

_ROWS = 64
"""Rows multiplied at once: always as many, so that no sample's rounding depends on the batch that it is in."""


class Moments:
    """Of samples in uint8: n, t = Σ (x - o) of every feature, S = Σ (x - o)² or Σ (x - o)(x - o)ᵀ, least and largest x.

    With the origin o = 128 t and S, float64, are integers below 2⁵³: exact, so that they are the same however the
    samples are split over batches and processes, whose sums are added. The pairwise update of Chan, Golub and LeVeque
    1983 ("Algorithms for computing the sample variance") would round at every merge, in an order that the layout sets.
    """

    def __init__(self, features: int, *, second: Literal["variance", "covariance"], device: torch.device) -> None:
        self.n, self.low, self.high = 0, _MOST, 0
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self.square = self.total.new_zeros((features, features) if second == "covariance" else features)

    def update(self, batch: Tensor) -> None:
        """Take in samples (B, …), uint8."""
        for rows in torch.split(batch.flatten(1), _EXACT):
            away = rows.float() - _ORIGIN
            self.n += len(rows)
            self.total += away.sum(0)
            self.square += away.T @ away if self.square.dim() == 2 else (away * away).sum(0)
            low, high = (int(value) for value in rows.aminmax())
            self.low, self.high = min(self.low, low), max(self.high, high)

    def reduce(self, total: Callable[[Tensor], None], collect: Callable[[Any], list[Any]]) -> None:
        """Take in the samples of all processes, which all call this: ``total`` sums a tensor over them in place,
        ``collect`` gives every process's value."""
        n, low, high = zip(*collect((self.n, self.low, self.high)), strict=True)
        self.n, self.low, self.high = sum(n), min(low), max(high)
        total(self.total)
        total(self.square)

    @property
    def mean(self) -> Tensor:
        """Float64 (D,)."""
        mean: Tensor = _ORIGIN + self.total / self.n
        return mean

    @property
    def second(self) -> Tensor:
        """Variances, float64 (D,), or the covariance, (D, D): (nS - ttᵀ)/n², which alone rounds."""
        outer = torch.outer if self.square.dim() == 2 else torch.mul
        second: Tensor = (self.n * self.square - outer(self.total, self.total)) / self.n**2
        return second


@dataclass(frozen=True)
class Statistics:
    """Of the training part, in units of the largest value that there can be, 255.

    mean, variance: float64, of the image's shape, or (C, 1, 1) where only channels are asked for. low, high: of all
    features together. covariance: (D, D), if it is asked for.
    """

    mean: Tensor
    variance: Tensor
    low: float = 0.0
    high: float = 1.0
    covariance: Tensor | None = None

    @classmethod
    def of(cls, moments: Moments, shape: tuple[int, ...]) -> Statistics:
        second = moments.second / _MOST**2
        variance, covariance = (second.diagonal(), second) if second.dim() == 2 else (second, None)
        mean = moments.mean.view(shape) / _MOST
        return cls(mean, variance.view(shape), moments.low / _MOST, moments.high / _MOST, covariance)

    @property
    def constant(self) -> Tensor:
        """Which features have one value only, up to rounding: bool, of the image's shape."""
        return self.variance <= (1e-12 * self.mean) ** 2


def fit_preprocess(config: Preprocess, statistics: Statistics) -> State:
    """``scale`` s and ``shift`` b, float64, which broadcast against the image, and with whitening ``matrix``, Wᵀ:

        y = (s ⊙ x + b) Wᵀ

    x in the values that it is stored in, as a row; ``matrix`` (D, *shape of y). Raises ValueError where nothing varies
    in what is to be scaled, and where ``keep`` is more than varies.
    """
    low, high = statistics.low, statistics.high
    least, width = {"unit": (0.0, 1.0), "symmetric": (0.5, 0.5), "minmax": (low, high - low)}[config.rescale]
    if not width:
        raise ValueError(f"data.preprocess.rescale = minmax: every value of the training images is {low * _MOST:g}")
    least = -least / width
    mean, variance = statistics.mean / width + least, statistics.variance / width**2
    center, std = (mean.new_tensor(value) for value in (0.0, 1.0))
    if config.center != "none":
        center = _over(config.center, mean)
    if config.scale != "none":
        left = mean - center
        std = (_over(config.scale, variance) + _over(config.scale, (left - _over(config.scale, left)) ** 2)).sqrt()
        constant = _over(config.scale, statistics.constant.double()) == 1
        if config.scale != "feature" and constant.any():
            raise ValueError(
                f"data.preprocess.scale = {config.scale}: every pixel of a channel has one value in all training "
                "images; scale by feature leaves such alone, or none"
            )
        std = std.masked_fill(constant, 1.0)
    scale, shift = 1 / (_MOST * width * std), (least - center) / std
    state = {"scale": scale, "shift": shift}
    if config.whiten != "none":
        covariance, shape = statistics.covariance, mean.shape
        assert covariance is not None
        flat = (scale * _MOST).expand(shape).flatten()
        matrix = whitening(covariance * flat * flat[:, None], kind=config.whiten, eps=config.eps, keep=config.keep)
        state["matrix"] = matrix if config.whiten == "pca" else matrix.view(-1, *shape)
    return {name: tensor.cpu().contiguous() for name, tensor in state.items()}


def _over(which: str, values: Tensor) -> Tensor:
    """Means over all features, or over those of each channel; kept as dimensions of size 1."""
    if which == "feature" or (which == "channel" and values.dim() == 1):
        return values
    return values.mean(tuple(range(which == "channel", values.dim())), keepdim=True)


def whitening(covariance: Tensor, *, kind: Literal["pca", "zca"], eps: float, keep: float | None) -> Tensor:
    """Wᵀ, float64 (D, k) for PCA and (D, D) for ZCA, of a covariance (D, D); see the file's head.

    ``keep`` k components, or the fewest that have this share of the variance. Directions in which nothing varies, by
    the tolerance of a matrix's rank, are not kept. Raises ValueError where fewer than k are left.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums would follow their number, and with it the layout
    try:
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(covariance))
        rank = int((values > values[0] * len(values) * torch.finfo(values.dtype).eps).sum())
        k = rank if keep is None else keep
        if isinstance(k, float):
            shares = values[:rank].cumsum(0) / values[:rank].sum()
            k = min(int((shares < k).sum()) + 1, rank)
        if not 0 < k <= rank:
            raise ValueError(
                f"data.preprocess.keep = {keep}: the training images vary in {rank} directions only; keep "
                "at most as many"
            )
        values, vectors = values[:k], vectors[:, :k]
        # A vector is as good as its negative; so that there is one answer, its largest entry is positive.
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        matrix = vectors / (values + eps).sqrt()
        return matrix if kind == "pca" else torch.mm(matrix, vectors.T)
    finally:
        torch.set_num_threads(threads)


class Preprocessing:
    """What `fit_preprocess` found, applied to batches on ``device`` in ``dtype``; ``state`` is what is kept of it."""

    def __init__(self, state: State, *, device: torch.device, dtype: torch.dtype) -> None:
        self._to: Any = {"device": device, "dtype": dtype}
        self.load(state)

    def load(self, state: State) -> None:
        self.state = state
        self._there = {name: tensor.to(**self._to) for name, tensor in state.items()}

    def shape(self, image: tuple[int, ...]) -> tuple[int, ...]:
        """Of what images of this shape become."""
        return tuple(self.state["matrix"].shape[1:]) if "matrix" in self.state else image

    def __call__(self, image: Tensor) -> Tensor:
        """Images (B, …) of ``dtype``, which are overwritten, preprocessed: (B, *shape)."""
        image = image.mul_(self._there["scale"]).add_(self._there["shift"])
        if "matrix" not in self._there:
            return image
        matrix, rows = self._there["matrix"], image.flatten(1)
        blocks = torch.split(F.pad(rows, (0, 0, 0, -len(rows) % _ROWS)), _ROWS)
        with torch.autocast(image.device.type, enabled=False):  # evaluation asks for batches under it
            whitened = torch.cat([block @ matrix.flatten(1) for block in blocks])
        return whitened[: len(rows)].view(-1, *matrix.shape[1:])
