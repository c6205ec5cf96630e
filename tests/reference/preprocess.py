"""Textbook preprocessing: in two passes over all samples at once, in float64."""

import numpy as np


def preprocess(images, config):
    """Images (N, C, H, W) of bytes, rescaled, centred, scaled and whitened as the sections of ``config`` say."""
    x = images.astype(np.float64)
    low, high = {"unit": (0, 255), "symmetric": (127.5, 255), "minmax": (x.min(), x.max())}[config.rescale]
    x = (x - low) / (127.5 if config.rescale == "symmetric" else high - low)
    axes = {"all": (0, 1, 2, 3), "channel": (0, 2, 3), "feature": (0,)}
    if config.center != "none":
        x = x - x.mean(axes[config.center], keepdims=True)
    if config.scale != "none":
        std = x.std(axes[config.scale], keepdims=True)
        x = x / np.where(std < 1e-12, 1, std)
    if config.whiten == "none":
        return x
    rows = x.reshape(len(x), -1)
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    order = np.argsort(values)[::-1][: config.keep]
    turned = rows @ vectors[:, order] / np.sqrt(values[order] + config.eps)
    return turned if config.whiten == "pca" else (turned @ vectors[:, order].T).reshape(x.shape)
