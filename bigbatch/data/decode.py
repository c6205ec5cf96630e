"""From the bytes of an image file to pixels, no more of them than are needed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_ORIENTATION = 0x0112
_AS_IS = 1


class Unreadable(ValueError):
    """Bytes that give no image, and why."""


class Encoded:
    """An image whose header has been read; ``height`` and ``width`` are those of the upright image.

    Its bytes tell its format, whatever the file is called; of several images the first is taken, and an orientation in
    its EXIF data is followed. Colour becomes grey by ITU-R 601, or grey colour, as ``channels``, 1 or 3, wants it;
    transparency is dropped, and of 16 bits the upper eight are kept. Raises `Unreadable`, from `decode` too; above
    twice ``PIL.Image.MAX_IMAGE_PIXELS``, 179 million, nothing is decoded.
    """

    def __init__(self, data: bytes, *, channels: int) -> None:
        self._data, self._mode = data, "RGB" if channels == 3 else "L"
        with _telling_why():
            if not data:
                raise Unreadable("the file is empty")
            self._image = Image.open(BytesIO(data), formats=FORMATS)
            self._turn = self._image.getexif().get(_ORIENTATION, _AS_IS) if "exif" in self._image.info else _AS_IS
        sides = self._image.size if self._turn in range(5, 9) else self._image.size[::-1]
        self.height, self.width = sides

    def decode(self, reduction: float = 1.0) -> Tensor:
        """uint8 (C, H, W); of a JPEG, smaller by the largest of 1, 2, 4 and 8 that is at most ``reduction``."""
        with _telling_why():
            image: Image.Image = self._image
            if self._image.format == "JPEG" and image.mode in ("L", "RGB"):
                if reduction < 2 and self._turn == _AS_IS:
                    try:
                        mode = ImageReadMode.RGB if self._mode == "RGB" else ImageReadMode.GRAY
                        pixels: Tensor = decode_jpeg(torch.frombuffer(self._data, dtype=torch.uint8), mode=mode)
                        return pixels
                    except RuntimeError:  # PIL says better why, or manages
                        pass
                self._image.draft(self._mode, (int(image.width / reduction) or 1, int(image.height / reduction) or 1))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise Unreadable(f"pixels of mode {image.mode} have no known range; convert them to 8 bits")
            array = np.array(image.convert(self._mode))
            return torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)


@contextmanager
def _telling_why() -> Iterator[None]:
    """Decoders raise whatever damaged bytes lead them to, and warn of what cannot be changed here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Unreadable, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Unreadable(f"no image, or none of {', '.join(FORMATS)}") from None
    except Exception as error:
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error
