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

_EXACT = 1024
"""Rows of uint8, less 128, whose squares add up to 2²⁴ at most: exactly, in float32."""

_ROWS = 64
"""Rows multiplied at once: always as many, so that no sample's rounding depends on the batch that it is in."""


class Moments:
    """n, t = Σ (x - o) and S = Σ (x - o)² of every feature, or S = Σ (x - o)(x - o)ᵀ; the least and the largest value.

    Of uint8 the origin o is 128, and all sums are integers below 2⁵³: exact, so that they are the same however the
    samples are split over batches and processes. Of floats o is the mean of the first batch, and where parts meet
    that have another, it is moved, with δ = o - o':

        t' = t + nδ,   S' = S + tδᵀ + δtᵀ + nδδᵀ,

    which about both means (t = 0) is the pairwise update of Chan, Golub and LeVeque 1983 ("Algorithms for computing the
    sample variance"). All is float64.
    """

    def __init__(self, features: int, *, second: Literal["variance", "covariance"], device: torch.device) -> None:
        self.n, self.low, self.high, self.unit = 0, float("inf"), -float("inf"), 1.0
        self.origin, self.total = torch.zeros(2, features, dtype=torch.float64, device=device)
        self.square = self.total.new_zeros((features, features) if second == "covariance" else features)

    def update(self, batch: Tensor) -> None:
        """Take in samples (B, …), uint8, or floats whose range is [0, 1]."""
        for rows in torch.split(batch.flatten(1), _EXACT):
            exact = rows.dtype == torch.uint8
            work = rows.to(torch.float32 if exact else torch.float64)
            if not self.n:
                self.origin = torch.full_like(self.origin, 128) if exact else work.mean(0)
                self.unit = 255.0 if exact else 1.0
            away = work - self.origin.to(work.dtype)
            self.n += len(rows)
            self.total += away.sum(0)
            self.square += away.T @ away if self.square.dim() == 2 else (away * away).sum(0)
            low, high = (float(value) for value in rows.aminmax())
            self.low, self.high = min(self.low, low), max(self.high, high)

    def merge(self, other: Moments) -> None:
        """Take in the samples of another, which is moved to this one's origin."""
        if other.n:
            if not self.n:
                self.origin, self.unit = other.origin, other.unit
            other.move(self.origin)
            self.n, self.total, self.square = self.n + other.n, self.total + other.total, self.square + other.square
            self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def reduce(self, total: Callable[[Tensor], None], collect: Callable[[Any], list[Any]]) -> None:
        """Merge those of all processes, which all call this: ``total`` sums a tensor over them in place, ``collect``
        gives every process's value, by rank."""
        rows = [row for row in collect((self.n, self.low, self.high, self.unit, self.origin.cpu())) if row[0]]
        if not rows:
            return
        n, low, high, units, origins = zip(*rows, strict=True)
        self.move(origins[0].to(self.origin.device))
        self.n, self.low, self.high, self.unit = sum(n), min(low), max(high), units[0]
        total(self.total)
        total(self.square)

    def move(self, origin: Tensor) -> None:
        """Make them about another origin, float64 (D,)."""
        delta, outer = self.origin - origin, torch.outer if self.square.dim() == 2 else torch.mul
        if delta.any():
            self.square += outer(self.total, delta) + outer(delta, self.total) + self.n * outer(delta, delta)
            self.total += self.n * delta
        self.origin = origin

    @property
    def mean(self) -> Tensor:
        """Float64 (D,)."""
        mean: Tensor = self.origin + self.total / self.n
        return mean

    @property
    def second(self) -> Tensor:
        """Variances, float64 (D,), or the covariance, (D, D): (nS - ttᵀ)/n², for uint8 without any cancellation."""
        outer = torch.outer if self.square.dim() == 2 else torch.mul
        second: Tensor = (self.n * self.square - outer(self.total, self.total)) / self.n**2
        return second


@dataclass(frozen=True)
class Statistics:
    """Of the training part, in units of the largest value that there can be, ``unit``: 255 for uint8, 1 for floats.

    mean, variance: float64, of the image's shape, or (C, 1, 1) where only channels are asked for. low, high: of all
    features together. covariance: (D, D), if it is asked for.
    """

    mean: Tensor
    variance: Tensor
    unit: float = 255.0
    low: float = 0.0
    high: float = 1.0
    covariance: Tensor | None = None

    @classmethod
    def of(cls, moments: Moments, shape: tuple[int, ...]) -> Statistics:
        unit, second = moments.unit, moments.second / moments.unit**2
        variance, covariance = (second.diagonal(), second) if second.dim() == 2 else (second, None)
        mean = moments.mean.view(shape) / unit
        return cls(mean, variance.view(shape), unit, moments.low / unit, moments.high / unit, covariance)

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
    unit, low, high = statistics.unit, statistics.low, statistics.high
    least, width = {"unit": (0.0, 1.0), "symmetric": (0.5, 0.5), "minmax": (low, high - low)}[config.rescale]
    if not width:
        raise ValueError(f"data.preprocess.rescale = minmax: every value of the training images is {low * unit:g}")
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
    scale, shift = 1 / (unit * width * std), (least - center) / std
    state = {"scale": scale, "shift": shift}
    if config.whiten != "none":
        covariance, shape = statistics.covariance, mean.shape
        assert covariance is not None
        flat = (scale * unit).expand(shape).flatten()
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
