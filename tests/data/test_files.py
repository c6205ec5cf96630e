"""Class folders as datasets: the same samples in every layout, whatever some of the files are."""

from __future__ import annotations

import errno
import os
import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from bigbatch.config.models import Augment, Folder
from bigbatch.data import DataError, Loader, Stream, load_data
from bigbatch.data.files import EncodedPart
from bigbatch.data.listing import listed
from bigbatch.data.transforms import Transforms
from images import image_loader
from pictures import BAD, encoded, pixels, write_folder
from ranks import run_ranks

STEPS = ({"RandomResizedCrop": {"size": 24}}, "RandomHorizontalFlip", {"ColorJitter": {"brightness": 0.4}})
CPU = torch.device("cpu")


def dataset(root, **changes):
    options = {"shape": (3, 24, 24), "transforms": STEPS, **changes}
    return load_data(Folder(name="folder", path=str(root), **options), seed=5)


def spoil(root):
    """Every kind of bad file in the place of an image of the first class; and a PNG that is called .jpg."""
    for part, skipped in (("train", 0), ("val", 2)):
        for i, (data, _) in enumerate([*BAD.values()][skipped:]):
            (root / part / "cat" / f"{2 * i:02d}.jpg").write_bytes(data)
    (root / "train" / "dog" / "00.jpg").write_bytes(encoded(pixels(1000), "PNG"))
    return root


def loader(data, *, workers=0) -> Loader:
    data = data.__class__(**{**vars(data), "mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)})
    stream = Stream(len(data.train), seed=5, epoch_samples=len(data.train))
    return image_loader(
        data, stream=stream, augment=Augment(), seed=5, device=CPU, dtype=torch.float32, workers=workers
    )


def epochs_on(rank, world, root, workers):
    """Two epochs in windows of 10 and the validation part, as one of ``world`` processes gets them; and what it could
    not read, and what it says of the first such file if it is not told to skip it."""
    made, strict = (loader(dataset(root, unreadable=way), workers=workers) for way in ("skip", "fail"))
    size = len(made.dataset.train)
    windows = [range(at, at + 10) for at in range(0, 2 * size, 10)]
    shares = [(w[len(w) * rank // world : len(w) * (rank + 1) // world], w) for w in windows]
    made.follow(iter(shares))
    train = [made.train(share, window=window) for share, window in shares]
    held = list(made.evaluate("validation", rank=rank, world_size=world, batch=4))
    with pytest.raises(DataError) as caught:
        for share, window in shares:
            strict.train(share, window=window)
    for each in (made, strict):
        each.close()
    return train, held, made.reader.problems, str(caught.value)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    return spoil(write_folder(tmp_path_factory.mktemp("spoiled")))


def joined(pieces, name):
    return torch.cat([piece[name] for piece in pieces])


def same(parts, whole):
    """Whether what several processes got is together what one got."""
    train, held, problems, _ = whole
    for step, batch in enumerate(train):
        assert all(torch.equal(joined([part[0][step] for part in parts], name), batch[name]) for name in batch)
    pieces = [batch for part in parts for batch in part[1]]
    assert all(torch.equal(joined(pieces, name), joined(held, name)) for name in held[0])
    return {name: why for part in parts for name, why in part[2].items()} == problems


@pytest.mark.parametrize("workers", [0, *(pytest.param(n, marks=pytest.mark.cluster) for n in (1, 3))])
def test_two_processes_see_what_one_does_and_say_what_they_could_not_read(spoiled, workers):
    alone = epochs_on(0, 1, spoiled, 0)
    ranks = run_ranks(2, epochs_on, 2, spoiled, workers)
    assert same(ranks, alone)
    bad = {"train": len(BAD), "val": len(BAD) - 2}
    assert sorted(alone[2]) == [str(spoiled / p / "cat" / f"{2 * i:02d}.jpg") for p, n in bad.items() for i in range(n)]
    for *_, message in (alone, *ranks):
        assert re.match(rf"{spoiled}/train/cat/0[02468]\.jpg: cannot be read \(.*data\.unreadable=skip", message)


def test_workers_change_nothing(spoiled):
    assert same([epochs_on(0, 1, spoiled, 2)], epochs_on(0, 1, spoiled, 0))


class Numbers:
    """Images of one pixel, its number; some are not there."""

    def __init__(self, size, *, gone):
        self.labels, self.gone = torch.arange(size) + 1000, gone

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return str(i)

    def read(self, i):
        if i in self.gone:
            raise OSError(errno.ENOENT, "gone")
        return encoded(np.array([[i]], dtype=np.uint8), "PNG")


def numbers(size, *, gone, seed=0):
    nothing = Transforms((), shape=(1, 1, 1), key="data.transforms")
    source = Numbers(size, gone=gone)
    return EncodedPart(source, train=nothing, evaluation=nothing, unreadable="skip", seed=seed)


@settings(max_examples=20, deadline=None)
@given(st.data(), st.integers(1, 20), st.integers(0, 2**40))
def test_what_stands_in_for_an_unreadable_image_follows_from_the_files_alone(data, size, epoch):
    gone = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    index = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=9)))
    whole = numbers(size, gone=gone).gather(torch.arange(size), torch.zeros(size, dtype=torch.int64))
    stand_in = whole["image"].flatten().long()
    assert [i for i in range(size) if stand_in[i] != i] == sorted(gone) and not gone & set(stand_in.tolist())
    assert torch.equal(whole["label"], stand_in + 1000), "its label comes with it"
    some = numbers(size, gone=gone, seed=1).gather(index, torch.full_like(index, epoch))
    assert torch.equal(some["image"].flatten(), stand_in[index])


def test_many_images_share_in_standing_in_for_a_lost_shard():
    part = numbers(250, gone=set(range(30, 180)))
    stand_ins = part.gather(torch.arange(30, 180), torch.zeros(150, dtype=torch.int64))["image"].flatten()
    assert stand_ins.bincount().max() <= 6 and len(stand_ins.unique()) > 60  # of 100


def test_evaluation_leaves_out_what_cannot_be_read(spoiled):
    part = dataset(spoiled, unreadable="skip").train
    batch = part.gather(torch.arange(12))
    assert batch["index"].tolist() == [1, 3, 5, 7, 9, 10, 11]
    assert len(batch["image"]) == len(batch["label"]) == 7
    assert len(part.gather(torch.tensor([0, 2]))["index"]) == 0


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_ends_the_run_with_its_name_and_reason(tmp_path, name):
    root = write_folder(tmp_path, train=3)
    path = root / "train" / "dog" / "01.jpg"
    path.write_bytes(BAD[name][0])
    with pytest.raises(DataError, match=rf"{path}: cannot be read \(.*{BAD[name][1]}.*\); .*data\.unreadable=skip"):
        dataset(root).train.gather(torch.arange(6))


def test_a_folder_of_nothing_but_bad_files_ends_the_run(tmp_path):
    root = write_folder(tmp_path, train=3)
    for path in (root / "train").glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 6 images can be read, such as .*00\.jpg"):
        dataset(root, unreadable="skip").train.gather(torch.arange(2), torch.zeros(2, dtype=torch.int64))


def test_a_file_that_is_gone_is_unreadable_and_a_disk_that_fails_is_not(tmp_path, monkeypatch):
    root = write_folder(tmp_path, train=2)
    part, lenient = (dataset(root, unreadable=way).train for way in ("fail", "skip"))
    (root / "train" / "cat" / "01.jpg").unlink()
    with pytest.raises(DataError, match=r"01\.jpg: cannot be read \(No such file"):
        part.gather(torch.tensor([1]))
    assert len(lenient.gather(torch.tensor([1]))["index"]) == 0
    for code in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT):
        monkeypatch.setattr(lenient.source, "read", partial(fails, code))
        with pytest.raises(DataError, match=rf"00\.jpg: cannot be read now .*{os.strerror(code)}"):
            lenient.gather(torch.tensor([0]))


def fails(code, i):
    raise OSError(code, os.strerror(code))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 19), min_size=1, max_size=12), st.data())
def test_a_sample_is_a_function_of_epoch_and_number_alone(clean, index, data):
    epoch = data.draw(st.lists(st.integers(0, 2**40), min_size=len(index), max_size=len(index)))
    cut = data.draw(st.integers(0, len(index)))
    part = dataset(clean).train
    i, e = torch.tensor(index), torch.tensor(epoch)
    state = torch.get_rng_state()
    whole = part.gather(i, e)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    pieces = [part.gather(i[s], e[s]) for s in (slice(cut, None), slice(cut)) if len(i[s])]
    assert torch.equal(joined(pieces[::-1], "image"), whole["image"])


def test_evaluation_draws_nothing_and_training_does(clean):
    part = dataset(clean).train
    index = torch.arange(4)
    a, b = (part.gather(index, torch.full((4,), epoch))["image"] for epoch in (0, 1))
    assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    still = part.gather(index)["image"]
    assert torch.equal(still, part.gather(index.flip(0))["image"].flip(0))


def test_the_default_transforms_are_those_of_imagenet(clean):
    data = dataset(clean, transforms=None)
    assert listed.cache_info().currsize == 0, "a million paths are kept"
    assert data.spec.shape == (3, 24, 24) and data.spec.names == ("cat", "dog") and data.spec.classes == 2
    assert data.train.gather(torch.arange(3), torch.zeros(3, dtype=torch.int64))["image"].shape == (3, 3, 24, 24)
    image = torch.from_numpy(np.array(Image.open(clean / "val" / "cat" / "00.jpg")))
    expected = v2.CenterCrop(24)(v2.Resize(27)(image.permute(2, 0, 1)))
    assert torch.equal(data.validation.gather(torch.tensor([0]))["image"][0], expected)
    index = torch.arange(len(data.test))
    assert torch.equal(data.test.gather(index)["image"], data.validation.gather(index)["image"])


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((), r"makes uint8 \(3, 40, 48\) of an image of 40 × 48 pixels, where the model gets uint8 \(3, 24, 24\)"),
        (({"RandomCrop": {"size": 24}}, {"Pad": {"padding": 1}}, {"CenterCrop": {"size": 24}}), None),
        (({"RandomCrop": {"size": [24, 24], "padding": 0}},), None),
    ],
)
def test_steps_that_do_not_give_the_shape_name_the_file(clean, steps, message):
    part = dataset(clean, transforms=steps).train
    index = torch.tensor([2]), torch.tensor([0])
    if message is None:
        assert part.gather(*index)["image"].shape == (1, 3, 24, 24)
    else:
        with pytest.raises(DataError, match=rf"02\.jpg: data\.transforms: {message}"):
            part.gather(*index)
