from __future__ import annotations

import numpy as np
import pytest
import torch

from bigbatch.config.models import Augment
from bigbatch.data import augment_images
from bigbatch.keyed import uniform
from reference.augment import augment

SEED = 11
EVERYTHING = Augment(shift=3, flip=True, erase=0.6)


def pictures(n, shape=(2, 9, 7), dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (n, *shape), generator=generator).to(dtype)


def keys(n):
    return {"epoch": torch.arange(n) // 50, "index": torch.arange(n) * 7 % 1000}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "config", [Augment(shift=2), Augment(flip=True), Augment(erase=1.0), Augment(shift=8), EVERYTHING], ids=repr
)
def test_equals_the_loop_over_pixels(config, dtype):
    images, where = pictures(60, dtype=dtype), keys(60)
    u = torch.stack([uniform(SEED, where["epoch"], where["index"], draw=d) for d in range(8)], 1)
    got = augment_images(images, config=config, seed=SEED, **where)
    assert got.dtype == dtype and got.shape == images.shape
    for image, draws, result in zip(images.numpy(), u.tolist(), got.numpy(), strict=True):
        expected = augment(image, shift=config.shift, flip=config.flip, erase=config.erase, u=draws)
        assert np.array_equal(result, expected)


def test_a_sample_does_not_depend_on_its_company():
    images, where = pictures(128), keys(128)
    whole = augment_images(images, config=EVERYTHING, seed=SEED, **where)
    turned = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    for part in (turned, turned[:1], turned[5:60]):
        some = {name: key[part] for name, key in where.items()}
        assert torch.equal(augment_images(images[part], config=EVERYTHING, seed=SEED, **some), whole[part])


def test_epoch_seed_and_sample_each_change_the_draw():
    image = torch.arange(1, 29 * 29 + 1, dtype=torch.float32).view(1, 1, 29, 29).expand(200, 1, 29, 29)
    zero, n = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    base = augment_images(image, config=EVERYTHING, seed=0, epoch=zero, index=n)
    for seed, epoch, index in ((1, zero, n), (0, zero + 1, n), (0, zero, n + 200)):
        other = augment_images(image, config=EVERYTHING, seed=seed, epoch=epoch, index=index)
        assert (base == other).flatten(1).all(1).double().mean() < 0.05


def test_nothing_asked_nothing_changed():
    images = pictures(4)
    assert augment_images(images, config=Augment(), seed=0, **keys(4)) is images


def test_input_is_left_alone():
    images = pictures(40)
    before = images.clone()
    augment_images(images, config=EVERYTHING, seed=0, **keys(40))
    assert torch.equal(images, before)


def test_shifts_are_uniform_over_the_square():
    n, s = 10_000, 2
    point = torch.zeros(n, 1, 9, 9)
    point[:, :, 4, 4] = 1
    where = {"epoch": torch.zeros(n, dtype=torch.int64), "index": torch.arange(n)}
    moved = augment_images(point, config=Augment(shift=s), seed=0, **where).sum((0, 1))
    inner = moved[2:7, 2:7]
    assert inner.sum() == n == moved.sum()
    assert ((inner - n / 25) ** 2 / (n / 25)).sum() < 52.6  # χ², 24 degrees of freedom, p = 0.0007


def test_half_are_flipped():
    n = 10_000
    image = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2).expand(n, 1, 1, 2)
    where = {"epoch": torch.zeros(n, dtype=torch.int64), "index": torch.arange(n)}
    flipped = augment_images(image, config=Augment(flip=True), seed=0, **where)[:, 0, 0, 0] == 2
    assert abs(flipped.double().mean() - 0.5) < 4 * 0.5 / n**0.5


def test_erased_rectangles_have_the_asked_for_size_and_share():
    n, side = 4000, 60
    where = {"epoch": torch.zeros(n, dtype=torch.int64), "index": torch.arange(n)}
    gone = augment_images(torch.ones(n, 1, side, side), config=Augment(erase=0.3), seed=0, **where)[:, 0] == 0
    hit = gone.flatten(1).any(1)
    assert abs(hit.double().mean() - 0.3) < 4 * 0.46 / n**0.5
    gone = gone[hit]
    tall, wide = gone.any(2).sum(1), gone.any(1).sum(1)
    area = gone.flatten(1).sum(1)
    assert torch.equal(area, tall * wide)  # rectangles
    assert area.min() / side**2 > 0.018 and area.max() / side**2 < 0.34
    assert abs(area.double().mean() / side**2 - 0.175) < 0.01
    free = (tall < side) & (wide < side)
    aspect = (tall / wide)[free]
    assert 0.25 < aspect.min() < 0.35 and 2.9 < aspect.max() < 3.8
    assert abs((aspect > 1).double().mean() - 0.5) < 0.05
    assert gone.any(0).any(0).all() and gone.any(0).any(1).all()  # every row and column can go
