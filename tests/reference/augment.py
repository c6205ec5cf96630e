"""One image at a time, pixel by pixel: flip, shift and erase as their definitions say."""

from __future__ import annotations

import math

import numpy as np


def augment(image, *, shift, flip, erase, u):
    """``image`` (C, H, W); ``u``: the sample's draws dy, dx, flip, erase, area, aspect, top, left in [0, 1)."""
    channels, height, width = image.shape
    dy, dx = (shift - math.floor(u[i] * (2 * shift + 1)) for i in (0, 1))
    out = np.zeros_like(image)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                row, column = y - dy, x - dx
                if 0 <= row < height and 0 <= column < width:
                    out[c, y, x] = image[c, row, width - 1 - column if flip and u[2] < 0.5 else column]
    if u[3] < erase:
        area, ratio = (0.02 + 0.31 * u[4]) * height * width, 0.3 ** (2 * u[5] - 1)
        tall = min(max(round(math.sqrt(area * ratio)), 1), height)
        wide = min(max(round(math.sqrt(area / ratio)), 1), width)
        top, left = math.floor(u[6] * (height - tall + 1)), math.floor(u[7] * (width - wide + 1))
        out[:, top : top + tall, left : left + wide] = 0
    return out
