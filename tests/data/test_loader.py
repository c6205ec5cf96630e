from __future__ import annotations

import pytest
import torch

from bigbatch.config.models import Augment, Digits, Synthetic
from bigbatch.data import Stream, augment_images, load_data, shares
from images import image_loader

EVERYTHING = Augment(shift=2, flip=True, erase=0.5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return load_data(Digits(name="digits"), seed=0)


def loader(data, *, augment=EVERYTHING, seed=4, dtype=torch.float64, device=CPU):
    stream = Stream(len(data.train), seed=seed, epoch_samples=len(data.train))
    return image_loader(data, stream=stream, augment=augment, seed=seed, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batch_is_gathered_augmented_and_normalised(digits, dtype):
    batch = loader(digits, dtype=dtype).train(range(1000, 1200))
    index, epoch = (torch.from_numpy(a) for a in Stream(1085, seed=4, epoch_samples=1085).locate(range(1000, 1200)))
    assert torch.equal(batch["index"], index) and torch.equal(batch["epoch"], epoch)
    assert epoch.unique().tolist() == [0, 1]
    pixels, labels = digits.train.gather(index).values()
    assert torch.equal(batch["label"], labels)
    pixels = augment_images(pixels, config=EVERYTHING, seed=4, epoch=epoch, index=index)
    expected = (pixels.double() / 255 - digits.mean) / digits.std
    assert batch["image"].dtype == dtype
    torch.testing.assert_close(batch["image"], expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("layout", [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_a_window_is_the_same_in_every_layout(digits, layout):
    world_size, accumulation = layout
    samples, start = 90, 1050
    whole = loader(digits).train(range(start, start + samples))
    steps = shares(samples, micro=96 // (world_size * accumulation), world_size=world_size, accumulation=accumulation,
                   span=2)  # fmt: skip
    ranks = [loader(digits) for _ in range(world_size)]
    pieces = [
        ranks[r].train(range(start + share.start, start + share.stop))
        for step in reversed(steps)  # nor does the order of asking matter
        for r, share in enumerate(step)
        if share
    ]
    joined = {name: torch.cat([piece[name] for piece in pieces]) for name in whole}
    place = {pair: i for i, pair in enumerate(zip(joined["epoch"].tolist(), joined["index"].tolist(), strict=True))}
    order = torch.tensor([place[pair] for pair in zip(whole["epoch"].tolist(), whole["index"].tolist(), strict=True)])
    assert len(order) == samples == len(joined["index"])
    assert all(torch.equal(joined[name][order], whole[name]) for name in whole)


def test_an_epoch_has_every_sample_once(digits):
    indices = [loader(digits).train(range(a, min(a + 256, 1085)))["index"] for a in range(0, 1085, 256)]
    assert torch.equal(torch.cat(indices).sort().values, torch.arange(1085))


def test_empty_range_gives_one_stand_in(digits):
    batch = loader(digits).train(range(30, 30))
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        "image": (1, 1, 8, 8), "label": (1,), "index": (1,), "epoch": (1,)}  # fmt: skip
    assert batch["index"].tolist() == [0]
    assert batch["image"].isfinite().all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("part", "batch"), [("validation", 50), ("test", 512), ("train", 7)])
def test_evaluation_sees_every_sample_once_and_unchanged(digits, world_size, part, batch):
    seen = []
    for rank in range(world_size):
        mine = list(loader(digits).evaluate(part, rank=rank, world_size=world_size, batch=batch))
        assert all(len(b["index"]) <= batch for b in mine)
        seen.append({name: torch.cat([b[name] for b in mine]) for name in ("image", "label", "index", "epoch")})
    sizes = [len(s["index"]) for s in seen]
    assert max(sizes) - min(sizes) <= 1
    index = torch.cat([s["index"] for s in seen])
    data = getattr(digits, part)
    assert torch.equal(index.sort().values, torch.arange(len(data)))
    pixels, labels = data.gather(index).values()
    assert torch.equal(torch.cat([s["label"] for s in seen]), labels)
    expected = (pixels.double() / 255 - digits.mean) / digits.std
    torch.testing.assert_close(torch.cat([s["image"] for s in seen]), expected, rtol=1e-12, atol=1e-12)


def test_evaluation_of_fewer_samples_than_ranks():
    data = load_data(Synthetic(name="synthetic", size=8, shape=(1, 4, 4), evaluation=2), seed=0)
    shares = [list(loader(data, augment=Augment()).evaluate("test", rank=r, world_size=5, batch=4)) for r in range(5)]
    assert sorted(int(b["index"]) for share in shares for b in share) == [0, 1]
    assert [] in shares


def test_shift_out_of_the_frame(digits):
    with pytest.raises(ValueError, match=r"data\.augment\.shift = 8: .*less than their 8 pixels"):
        loader(digits, augment=Augment(shift=8))
    loader(digits, augment=Augment(shift=7))


@pytest.mark.gpu
def test_batch_on_a_gpu_equals_that_on_the_cpu(digits):
    device, augment = torch.device("cuda"), EVERYTHING.model_copy(update={"mixup": 0.3, "cutmix": 1.0})
    here, there = (loader(digits, augment=augment, device=d).train(range(65)) for d in (CPU, device))
    assert all(t.device.type == "cuda" for t in there.values())
    assert all(torch.equal(here[name], there[name].cpu()) for name in ("label", "label2", "index", "epoch", "share"))
    torch.testing.assert_close(there["image"].cpu(), here["image"], rtol=1e-12, atol=1e-12)
