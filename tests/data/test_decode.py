"""Bytes become upright uint8 images, whatever they are called and however they are stored."""

from __future__ import annotations

import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from bigbatch.data.decode import Encoded, Unreadable
from pictures import BAD, JPEG, encoded, pixels

COLOUR, GREY = pixels(0), pixels(0, channels=1)


def decode(data, *, channels=3, reduction=1.0):
    image = Encoded(data, channels=channels)
    found = image.decode(reduction)
    assert found.dtype == torch.uint8 and len(found) == channels
    if reduction == 1:
        assert found.shape[1:] == (image.height, image.width)
    return found.permute(1, 2, 0).squeeze(-1).numpy()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_formats_without_loss(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encoded(COLOUR, kind, **options)), COLOUR)


def test_jpeg_is_what_pil_makes_of_it():
    assert np.array_equal(decode(JPEG), np.asarray(Image.open(BytesIO(JPEG))))
    grey = decode(encoded(GREY))
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert abs(decode(JPEG, channels=1).astype(int) - np.asarray(Image.fromarray(pixels(99)).convert("L"))).max() < 6


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK", "I;16"])
def test_other_modes_become_the_channels_that_are_wanted(mode):
    if mode == "I;16":
        image = Image.fromarray((GREY.astype(np.uint16) << 8) + 7)
    else:
        image = Image.fromarray(COLOUR).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    expected = Image.fromarray(GREY) if mode == "I;16" else image
    for channels, wanted in ((3, "RGB"), (1, "L")):
        assert np.array_equal(decode(data, channels=channels), np.asarray(expected.convert(wanted)))


def test_transparency_of_a_palette_is_dropped_without_a_word():
    image = Image.fromarray(COLOUR).convert("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(encoded(image, "PNG", transparency=bytes(range(256))))
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_images_are_upright(kind, orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(COLOUR, kind, exif=exif))
    expected = np.rot90(COLOUR, turns)
    assert found.shape == expected.shape
    assert abs(found.astype(int) - expected).mean() < (3 if kind == "JPEG" else 0.001)


@pytest.mark.parametrize(("reduction", "by"), [(1.0, 1), (1.9, 1), (2.0, 2), (3.9, 2), (4.0, 4), (50.0, 8)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_decoded_smaller(reduction, by, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(pixels(3, 160, 96), exif=exif), reduction=reduction)
    sides = (160 // by, 96 // by)
    assert found.shape == ((*sides, 3) if orientation == 1 else (*sides[::-1], 3))


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_are_unreadable(name):
    data, reason = BAD[name]
    for reduction in (1, 4):
        with pytest.raises(Unreadable, match=reason):
            decode(data, reduction=reduction)


def test_floats_have_no_known_range():
    with pytest.raises(Unreadable, match="mode F"):
        decode(encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"))
