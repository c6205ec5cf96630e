"""A window mixed one sample, and one pixel, at a time: mixup and CutMix as their papers define them."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import beta


def mix_window(images, labels, *, mixup, cutmix, u):
    """``images`` (N, C, H, W) float64; ``u`` (N, 4): the draws kind, share, y, x. Images, second labels, shares."""
    n, _, height, width = images.shape
    mixed, second, shares = np.empty_like(images), [], []
    for i in range(n):
        kind, draw, y, x = u[i]
        j = i + 1 if i % 2 == 0 else i - 1
        if j == n:
            j = max(i - 1, 0)
        if mixup > 0 and (cutmix == 0 or kind < 0.5):
            share = beta.ppf(draw, mixup, mixup)
            mixed[i] = share * images[i] + (1 - share) * images[j]
        else:
            side = math.sqrt(1 - beta.ppf(draw, cutmix, cutmix))
            tall, wide = math.floor(height * side), math.floor(width * side)
            top, left = math.floor(y * height) - tall // 2, math.floor(x * width) - wide // 2
            pasted = 0
            for row in range(height):
                for column in range(width):
                    inside = top <= row < top + tall and left <= column < left + wide
                    mixed[i, :, row, column] = images[j if inside else i, :, row, column]
                    pasted += inside
            share = 1 - pasted / (height * width)
        second.append(labels[j])
        shares.append(share)
    return mixed, np.array(second), np.array(shares)
