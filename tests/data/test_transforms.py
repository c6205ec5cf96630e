"""Transforms by name: v2's own, drawn by (seed, epoch, sample), of files and of what lies in memory."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from bigbatch.config.models import Digits
from bigbatch.data import DataError, load_data
from bigbatch.data.decode import Encoded
from bigbatch.data.transforms import Transforms, keyed_generator, sample_seeds
from pictures import encoded, pixels

CROP = {"RandomResizedCrop": {"size": 24}}
CHAINS = [
    (CROP, "RandomHorizontalFlip"),
    ({"RandomResizedCrop": {"size": [24, 24], "scale": [0.5, 1.0], "interpolation": "bicubic"}}, "RandomVerticalFlip"),
    ({"Resize": {"size": 30}}, {"RandomCrop": {"size": 24}}, "RandAugment"),
    (CROP, "TrivialAugmentWide", {"RandomErasing": {"p": 1.0}}),
    ({"Resize": {"size": [24, 24]}}, {"RandomAffine": {"degrees": 20, "translate": [0.1, 0.1], "shear": 5}}),
    (CROP, {"RandomApply": {"transforms": ["AugMix", {"RandomRotation": {"degrees": 30}}], "p": 0.5}}),
    (
        {"CenterCrop": {"size": 24}},
        {"ColorJitter": {"brightness": 0.4, "hue": 0.1}},
        {"GaussianBlur": {"kernel_size": 3}},
    ),
]


def built(step):
    name, arguments = (step, {}) if isinstance(step, str) else next(iter(step.items()))
    inner = {"transforms": [built(one) for one in arguments["transforms"]]} if "transforms" in arguments else {}
    mode = {"interpolation": v2.InterpolationMode.BICUBIC} if "interpolation" in arguments else {}
    return getattr(v2, name)(**{**arguments, **inner, **mode})


def made(steps, image, *, seed):
    transforms = Transforms(steps, shape=(3, 24, 24), key="data.transforms")
    with keyed_generator() as start:
        start(seed)
        return transforms(*image.shape[1:], load=lambda reduction: image)


@pytest.mark.parametrize("steps", CHAINS)
def test_a_chain_does_what_v2_does_after_the_same_seed(steps):
    image = torch.from_numpy(pixels(1, 40, 56).copy()).permute(2, 0, 1)
    compose = v2.Compose([built(step) for step in steps])
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        found.append(made(steps, image, seed=seed))
        assert torch.equal(found[-1], compose(image))
    assert len({tuple(one.flatten().tolist()) for one in found}) > 1


def test_a_crop_of_a_large_jpeg_is_near_what_all_of_its_pixels_give():
    data = encoded(pixels(2, 250, 320), quality=95)
    chain = Transforms((CROP,), shape=(3, 24, 24), key="k")
    reductions, distances = [], []
    for seed in range(12):
        image, views = Encoded(data, channels=3), []

        def load(reduction, image=image):
            reductions.append(reduction)
            return image.decode(reduction)

        for how in (load, lambda reduction: Encoded(data, channels=3).decode()):
            with keyed_generator() as start:
                start(seed)
                views.append(chain(image.height, image.width, load=how).int())
        distances.append((views[0] - views[1]).abs().float().mean().item())
    assert max(reductions) > 4 > 2 > min(reductions)
    assert 0 < max(distances) < 5  # a crop begins at whole pixels of what was decoded, up to a quarter of its own off


def test_seeds_differ_by_seed_epoch_and_sample():
    index, epoch = torch.arange(50).repeat(2), torch.tensor([0, 1]).repeat_interleave(50)
    seeds = [s for seed in (0, 1) for s in sample_seeds(seed, index, epoch)]
    assert len(set(seeds)) == 200
    assert sample_seeds(0, index[:50], None) == seeds[:50]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["RandomHorizontalflip"], r"'RandomHorizontalflip': .*has RandomHorizontalFlip"),
        (["functional"], r"'functional': .*has none of that name"),
        (["MixUp"], r"MixUp: mixes samples; set data\.augment\.mixup"),
        ([{"CutMix": {"num_classes": 3}}], r"CutMix: mixes samples; set data\.augment\.cutmix"),
        ([{"Resize": {"size": 24}, "Pad": {"padding": 1}}], r"an item of its own"),
        ([{}], r"an item of its own"),
        (["Resize"], r"Resize: .*size"),
        ([{"RandAugment": {"strength": 3}}], r"RandAugment: .*strength"),
        ([{"Resize": {"size": 24, "interpolation": "cubist"}}], r"Resize: .*cubist"),
        ([{"RandomApply": {"transforms": ["Rotation"]}}], r"RandomApply: 'Rotation': .*RandomRotation"),
        ([{"ToDtype": {"dtype": "float32"}}], r"ToDtype: dtype must be"),
        ([{"Resize": {"size": 12}}], r"makes uint8 \(3, 12, 12\) of an image of 24 × 24 pixels"),
        (["ToPureTensor", {"FiveCrop": {"size": 24}}], r"makes tuple of an image of 24 × 24 pixels"),
        ([{"Grayscale": {}}], r"makes uint8 \(1, 24, 24\)"),
    ],
)
def test_what_a_recipe_gets_wrong_is_said_before_the_run(steps, message):
    with pytest.raises(ValueError, match=rf"data\.transforms: .*({message})") as caught:
        Transforms(steps, shape=(3, 24, 24), key="data.transforms")
    assert not isinstance(caught.value, DataError)


def test_images_in_memory_are_transformed_too():
    steps = ({"RandomResizedCrop": {"size": 8}}, {"RandomRotation": {"degrees": 30}})
    plain, data = (load_data(Digits(name="digits", transforms=t), seed=3) for t in ((), steps))
    index, epoch = torch.tensor([4, 700, 4]), torch.tensor([0, 5, 1])
    found = data.train.gather(index, epoch)
    original = plain.train.gather(index)
    compose = v2.Compose([built(step) for step in steps])
    for row, seed in enumerate(sample_seeds(3, index, epoch)):
        torch.manual_seed(seed)
        assert torch.equal(found["image"][row], compose(original["image"][row]))
    assert torch.equal(found["label"], original["label"])
    assert torch.equal(data.validation.gather(index[:1])["image"], plain.validation.gather(index[:1])["image"])
    assert torch.equal(data.mean, plain.mean)


def test_transforms_of_evaluation_change_the_statistics():
    data = load_data(Digits(name="digits", eval_transforms=("RandomInvert",)), seed=3)
    index = torch.arange(30)
    assert data.mean is None and data.std is None
    assert not torch.equal(data.train.gather(index)["image"], data.train.gather(index, 0 * index)["image"])
    assert torch.equal(data.test.gather(index)["image"], data.test.gather(index)["image"])
