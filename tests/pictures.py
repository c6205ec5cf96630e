"""Image files, good and bad."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed, height=40, width=48, channels=3):
    """Smooth colours, which JPEG keeps well."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image if channels == 3 else image.convert("L"))


def encoded(image, kind="JPEG", **options):
    """The bytes of an array or image as a file of this kind."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def huge_png(side):
    """A few bytes that say they are side × side pixels."""
    png = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    png[16:24] = struct.pack(">II", side, side)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


JPEG = encoded(pixels(99), quality=95)
BAD = {
    "truncated": (JPEG[: len(JPEG) // 2], "truncated"),
    "zeroes": (b"", "empty"),
    "corrupt": (JPEG[:20] + bytes(len(JPEG) - 20), r"\w"),
    "text": (b"no image at all", "no image"),
    "huge": (huge_png(20_000), "400000000 pixels"),
}
"""Files that cannot be read, and what is said of them."""


def write_folder(root: Path, *, classes=("cat", "dog"), train=10, val=6) -> Path:
    """Class folders of JPEGs; each image is of a colour pattern of its own."""
    for split, count in (("train", train), ("val", val)):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                data = encoded(pixels(1000 * k + i + (500 if split == "val" else 0)), quality=95)
                (root / split / name / f"{i:02d}.jpg").write_bytes(data)
    return root
