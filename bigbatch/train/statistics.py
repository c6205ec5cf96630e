"""What images are preprocessed by: taken from the training part by all processes together, before there is a model."""

from __future__ import annotations

import math
import time
from typing import Literal

import numpy as np
import torch

from bigbatch.config import say
from bigbatch.config.models import Preprocess
from bigbatch.data import DataError, Dataset, Loader, Moments, Statistics, fit_preprocess, permute
from bigbatch.data.preprocess import LARGEST, State
from bigbatch.dist import Runtime
from bigbatch.keyed import fold
from bigbatch.plan import PlanWarning

QUIET = 2.0
"""Seconds between two words on how far it has come."""


def fit(
    config: Preprocess, loader: Loader, runtime: Runtime, *, seed: int, batch: int
) -> tuple[State, tuple[PlanWarning, ...]]:
    """What `fit_preprocess` gives, the same on every process, and warnings. A collective, unless the dataset knows what
    is needed.

    ``loader`` gives images as evaluation reads them, ``batch`` at a time, neither preprocessed nor moved into the run's
    dtype. Raises ValueError, on every process, where they cannot be read, or not be preprocessed so.
    """
    data = loader.dataset
    if (known := _known(config, data)) is not None:
        return fit_preprocess(config, known), ()
    features = math.prod(data.spec.shape)
    if config.whiten != "none" and features > LARGEST:
        raise ValueError(
            f"data.preprocess.whiten = {config.whiten}: the covariance of {features} features is too large, the limit "
            f"is {LARGEST}; use smaller images"
        )
    moments = _moments(config, loader, runtime, seed=seed, batch=batch)
    statistics = Statistics.of(moments, data.spec.shape)
    state: State | ValueError | None = None
    if runtime.rank == 0:
        try:
            state = fit_preprocess(config, statistics)
        except ValueError as error:
            state = error
    state = runtime.agree(state)  # eigenvectors are not the same to the last bit on every processor
    if isinstance(state, ValueError):
        raise state
    assert state is not None
    constant = int(statistics.constant.sum())
    if config.scale != "feature" or not constant:
        return state, ()
    message = f"data.preprocess.scale = feature: {constant} of {features} features are constant, and not scaled"
    return state, (PlanWarning("constant_features", message),)


def _known(config: Preprocess, data: Dataset) -> Statistics | None:
    """Where none are needed, any; else those of a dataset that has them beforehand, if no others are asked for."""
    asked = {config.center, config.scale}
    if config.rescale == "minmax" or config.whiten != "none" or not asked <= {"none", "channel"}:
        return None
    if asked == {"none"}:
        zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return Statistics(zero, one)
    if config.samples != "all" or data.mean is None or data.std is None:
        return None
    mean, std = (values.view(-1, *[1] * (len(data.spec.shape) - 1)) for values in (data.mean, data.std))
    return Statistics(mean, std**2)


def _moments(config: Preprocess, loader: Loader, runtime: Runtime, *, seed: int, batch: int) -> Moments:
    """Of all training samples, or of as many as asked for, chosen by the seed; merged over processes."""
    size = len(loader.dataset.train)
    count = size if config.samples == "all" else config.samples
    if count > size:
        raise ValueError(
            f"data.preprocess.samples = {count}: the training part has {size} samples; give at most as many"
        )
    chosen = torch.from_numpy(np.sort(permute(np.arange(count), size, fold(seed, -2)))) if count < size else None
    second: Literal["variance", "covariance"] = "variance" if config.whiten == "none" else "covariance"
    moments = Moments(math.prod(loader.dataset.spec.shape), second=second, device=runtime.device)
    shares = loader.evaluate("train", rank=runtime.rank, world_size=runtime.world_size, batch=batch, chosen=chosen)
    problem, said = None, time.monotonic()
    try:
        for each in shares:
            runtime.progress.enter("data")
            moments.update(each["image"])
            if runtime.rank == 0 and time.monotonic() - said > QUIET:
                say(f"statistics for data.preprocess: {moments.n} of {-(-count // runtime.world_size)} samples")
                said = time.monotonic()
    except DataError as error:
        problem = error
    if found := [each for each in runtime.collect(problem) if each]:
        raise found[0]
    moments.reduce(runtime.sum, runtime.collect)
    runtime.progress.enter("start")
    if not moments.n:
        raise ValueError("data.preprocess: no training image can be read to take statistics from")
    return moments
