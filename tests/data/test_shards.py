"""Tar shards: the samples of the folder they were made of, in every layout, whatever has become of some of them."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.config.models import Augment, Folder, Shards
from bigbatch.data import DataError, Dataset, Stream, load_data, size_of
from bigbatch.data import index as index_file
from bigbatch.data.cache import Cache
from bigbatch.data.index import BAD_LABEL, CUT, NO_IMAGE, NO_LABEL, TWICE, find, held_out, scan
from bigbatch.data.sampler import order
from bigbatch.data.shards import ShardSource
from images import image_loader
from pictures import JPEG
from ranks import run_ranks

CPU = torch.device("cpu")
STEPS = ({"RandomResizedCrop": {"size": 24}}, "RandomHorizontalFlip")


@pytest.fixture
def copy(dest, tmp_path):
    return shutil.copytree(dest, tmp_path / "copy")


def config(root, **changes):
    options = {"train": f"{root}/train-*.tar", "validation": f"{root}/val-{{000000..000002}}.tar", **changes}
    return Shards(name="shards", cache=f"{root}/cache", shape=(3, 24, 24), transforms=STEPS, **options)


def image_folder(root):
    return Folder(name="folder", path=str(root), shape=(3, 24, 24), transforms=STEPS)


def contents(source):
    return [(source.read(i), int(source.labels[i])) for i in range(len(source))]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def batches(rank, world, settings, workers):
    """Two epochs in windows of 8 and the validation part, as one of ``world`` processes gets them."""
    data = load_data(settings, seed=5)
    data = Dataset(**{**vars(data), "mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)})
    size = len(data.train)
    stream = Stream(size, seed=5, epoch_samples=size, shuffle=settings.shuffle)
    double = torch.float64
    loader = image_loader(data, stream=stream, augment=Augment(), seed=5, device=CPU, dtype=double, workers=workers)
    windows = [range(at, at + 8) for at in range(0, 2 * size, 8)]
    shares = [(window[len(window) * rank // world : len(window) * (rank + 1) // world], window) for window in windows]
    loader.follow(iter(shares))
    train = [loader.train(share, window=window) for share, window in shares]
    held = list(loader.evaluate("validation", rank=rank, world_size=world, batch=4))
    loader.close()
    return train, held, loader.reader.problems


def joined(pieces, name):
    return torch.cat([piece[name] for piece in pieces])


def test_shards_are_the_folder_in_a_keyed_order(folder, dest):
    known, found = load_data(image_folder(folder), seed=0), load_data(config(dest), seed=0)
    assert (found.spec, size_of(config(dest))) == (known.spec, 20)
    for epoch, split in enumerate(("train", "validation")):
        files, shards = known.part(split).source, found.part(split).source
        places = order(len(files), seed=3, epoch=epoch).tolist()
        assert contents(shards) == [(files.read(i), int(files.labels[i])) for i in places]
    assert found.test.source is found.validation.source


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_webdataset_reads_them(dest):
    import webdataset

    found = load_data(config(dest), seed=0).validation.source
    samples = list(webdataset.WebDataset(sorted(map(str, dest.glob("val-*.tar"))), shardshuffle=False))
    gc.collect()
    assert [(sample["jpg"], int(sample["cls"])) for sample in samples] == contents(found)
    names = [found.name(i).rpartition(":") for i in range(12)]
    assert (
        [key for *_, key in names] == [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(20, 32)]
    )
    assert [shard for shard, *_ in names] == [sample["__url__"] for sample in samples]


@pytest.fixture
def cut(copy):
    """Shards of which one is cut in the middle and one nearly gone."""
    os.truncate(copy / "train-000002.tar", (copy / "train-000002.tar").stat().st_size // 2)
    os.truncate(copy / "val-000001.tar", 100)
    return copy


def check_ranks(settings, *, workers):
    train, held, problems = batches(0, 1, settings, 0)
    ranks = run_ranks(2, batches, 2, settings, workers)
    for step, whole in enumerate(train):
        for name in whole:
            assert torch.equal(joined([ranks[r][0][step] for r in range(2)], name), whole[name])
    for name in held[0]:
        assert torch.equal(joined(ranks[0][1] + ranks[1][1], name), joined(held, name))
    assert ranks[0][2] | ranks[1][2] == problems
    return held, problems


def test_of_a_cut_shard_two_processes_see_what_one_does(cut):
    settings = config(cut, unreadable="skip", shuffle=8)
    held, problems = check_ranks(settings, workers=0)
    source, left = load_data(settings, seed=0).train.source, (cut / "train-000002.tar").stat().st_size
    gone = [i for i in range(8, 12) if source._rows["offset"][i] + source._rows["length"][i] > left]
    assert 0 < len(gone) < 4
    expected = {f"{cut}/train-000002.tar:{i:08d}" for i in gone} | {
        f"{cut}/val-000001.tar:{i:08d}" for i in range(24, 28)
    }
    assert problems == dict.fromkeys(expected, "the shard is cut or damaged there")
    assert len(joined(held, "label")) == 8


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("shuffle", ["all", 8])
def test_so_they_do_with_workers(cut, workers, shuffle):
    check_ranks(config(cut, unreadable="skip", shuffle=shuffle), workers=workers)


def test_a_cut_shard_is_told_of_before_the_run(cut):
    message = rf"^{cut}/train-000002\.tar: has \d+ bytes, and its index\.json says \d+; get it again, or pass over"
    with pytest.raises(ValueError, match=message):
        load_data(config(cut), seed=0)


def test_a_shard_that_is_cut_under_a_run_ends_it(copy):
    part = load_data(config(copy), seed=0).train
    os.truncate(copy / "train-000000.tar", 0)
    with pytest.raises(DataError, match=r"train-000000\.tar:00000002: cannot be read \(the shard is cut .*skip"):
        part.gather(torch.tensor([2]), torch.tensor([0]))


FAULTS = {
    "no label": ([("b.jpg", JPEG)], NO_LABEL),
    "label is no number": ([("b.jpg", JPEG), ("b.cls", b"dog")], BAD_LABEL),
    "negative": ([("b.jpg", JPEG), ("b.cls", b"-1")], BAD_LABEL),
    "json": ([("b.jpg", JPEG), ("b.json", b'{"label": "dog"}')], BAD_LABEL),
    "broken json": ([("b.jpg", JPEG), ("b.json", b'{"label": 1')], BAD_LABEL),
    "no image": ([("b.cls", b"1")], NO_IMAGE),
    "twice": ([("b.jpg", JPEG), ("b.cls", b"1"), ("b.jpg", JPEG)], TWICE),
    "two kinds": ([("b.png", JPEG), ("b.jpg", JPEG), ("b.cls", b"1")], TWICE),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_sample_is_named_or_counted(tmp_path, name):
    members, fault = FAULTS[name]
    reason = index_file.FAULTS[-1 - fault]
    good = [("a.jpg", JPEG), ("a.cls", b"0"), ("c.JPEG", JPEG), ("c.json", b'{"label": 1, "x": []}')]
    for file, content in (("t.tar", [*good, *members]), ("v.tar", good)):
        write_tar(tmp_path / file, content)
    options = {"train": str(tmp_path / "t.tar"), "validation": str(tmp_path / "v.tar")}
    with pytest.raises(ValueError, match=rf"t\.tar:b: {reason} \(1 of 3 .*data\.unreadable=skip"):
        load_data(config(tmp_path, **options), seed=0)
    part = load_data(config(tmp_path, **options, unreadable="skip"), seed=0).train
    assert (len(part), part.gather(torch.arange(3))["label"].tolist()) == (3, [0, 1])
    assert part.problems == {f"{tmp_path}/t.tar:b": reason}


@given(st.data())
def test_scanning_finds_what_was_written(data):
    """Members of a sample may stand anywhere, and have long names; other members are no matter."""
    keys = st.text("ab/-é0", min_size=1, max_size=150).filter(lambda key: key[-1] != "/" and "//" not in key)
    labels = data.draw(st.dictionaries(keys, st.integers(0, 2**31 - 1), min_size=1, max_size=6))
    images = {key: data.draw(st.binary(max_size=1100)) for key in labels}
    members = [(f"{key}.jpg", images[key]) for key in labels]
    members += [(f"{key}.cls", b"%d\n" % label) for key, label in labels.items()]
    members += [(f"{key}.seg.png", b"mask") for key in labels] + [("README", b"?"), ("._a.jpg", b"?")]
    file = io.BytesIO()
    with tarfile.open(
        fileobj=file, mode="w", format=data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    ) as tar:
        for name, content in data.draw(st.permutations(members)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    file.seek(0)
    rows = scan(file, "x").tolist()
    whole = file.getvalue()
    found = sorted((whole[offset : offset + length], label) for offset, length, label in rows)
    assert found == sorted((images[key], label) for key, label in labels.items())


@given(at=st.integers(512, 20_479))
def test_a_shard_that_is_cut_anywhere_says_so(dest, at):
    whole = (dest / "train-000001.tar").read_bytes()
    rows, cut = scan(io.BytesIO(whole), "x"), scan(io.BytesIO(whole[:at]), "x")
    end = int(rows["offset"][-1] + rows["length"][-1]) + 1024  # of the last label's header
    if at >= -(-end // 512) * 512 + 512:
        assert cut.tolist() == rows.tolist()
    else:
        assert cut["label"][-1] == CUT and (cut["label"][:-1] == rows["label"][: len(cut) - 1]).all()
        good = [row for row in cut.tolist() if row[2] >= 0]
        assert all(offset + length <= at for offset, length, _ in good)


def test_what_was_scanned_is_kept_until_the_shard_changes(copy, monkeypatch):
    (copy / "index.json").unlink()
    settings = config(copy)
    assert size_of(settings) == 20
    monkeypatch.setattr(index_file, "scan", lambda file, name: pytest.fail(f"{name} again"))
    assert size_of(settings) == 20
    with (copy / "train-000000.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(BaseException, match=r"train-000000\.tar again"):
        size_of(settings)


@given(st.integers(0, 500), st.integers(0, 500), st.floats(0.01, 0.99))
def test_a_share_is_no_other_for_more_samples(size, more, share):
    held = held_out(size + more, share)
    assert (held_out(size, share) == held[:size]).all()
    assert abs(held_out(4000, share).mean() - share) < 0.05


def test_a_share_of_the_training_shards_validates(dest):
    settings = config(dest, validation=0.4)
    data = load_data(settings, seed=0)
    train, held = data.train.source, data.validation.source
    assert size_of(settings) == len(train) and 0 < len(held) < 20
    every = load_data(config(dest), seed=0).train.source
    assert sorted(contents(train) + contents(held)) == sorted(contents(every))
    assert sorted(s.name(i) for s in (train, held) for i in range(len(s))) == [every.name(i) for i in range(20)]


def test_few_shards_are_open_and_none_are_pickled(dest, monkeypatch):
    monkeypatch.setattr("bigbatch.data.shards.OPEN", 2)
    cache = Cache(str(dest / "cache"))
    source = ShardSource(find(f"{dest}/train-*.tar", key="data.train", cache=cache), cache=cache)
    before = len(os.listdir("/proc/self/fd"))
    there = contents(source)
    assert [there[i] for i in (19, 3, 8)] == [contents(source)[i] for i in (19, 3, 8)]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    other = pickle.loads(pickle.dumps(source))
    assert other._open == {} and contents(other) == there
    del source, other
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "{root}/nothing-*.tar"}, r"data\.train = .*nothing.*there is no file .*data\.size=N"),
        ({"train": "{root}"}, r"data\.train = .*Is a directory"),
        (
            {"train": ("{root}/train-*.tar", "{root}/train-000001.tar")},
            r"data\.train = .*train-000001\.tar is named twice",
        ),
        ({"train": "{root}/index.npy"}, r"data\.train = .*index\.npy is no tar file"),
        ({"train": "pipe:cat {root}/train-000000.tar"}, r"data\.train = .*there is no file pipe:cat"),
        ({"train": "{pipe:cat a://b;,x}"}, r"data\.train = .*there is no file pipe:cat a://b;"),
        ({"train": ["pipe:a://b", "x"]}, r"data\.train = .*there is no file pipe:a://b"),
        ({"train": "{x://a,pipe://b}"}, r"data\.train = .*: x://a: only https and http are fetched"),
        ({"validation": "{pipe://a,pipe://b}"}, r"data\.validation = .*pipe:/+\S*: only https and http are fetched"),
        ({"train": "file:///x.tar"}, r"data\.train = .*file:///\S*: only https and http are fetched"),
        ({"train": "s3://bucket/x.tar"}, r"data\.train = .*s3://bucket/.*only https and http are fetched.*its path"),
        ({"train": "https://x/{0..9}{000000000..999999999}"}, r"data\.train = .*more than 1,000,000 shards"),
        ({"validation": "{root}/other.tar"}, r"data\.validation = .*classes"),
        ({"size": 21}, r"data\.size = 21: the data has 20 training samples"),
    ],
)
def test_shards_that_are_not_what_they_should_be(copy, changes, message):
    write_tar(copy / "other.tar", [("a.jpg", JPEG), ("a.cls", b"0")])
    there = json.loads(json.dumps(changes).replace("{root}", str(copy)))
    with pytest.raises(ValueError, match=message):
        load_data(config(copy, **there), seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("index.json", b"{", r"the index in \S+ is damaged \(.*get index\.json and index\.npy again"),
        ("index.json", b'{"format": "bigbatch shards 1"}', r"the index in \S+ is damaged \('classes'\)"),
        ("index.npy", b"", r"the index in \S+ is damaged"),
        ("index.npy", None, r"No such file or directory: '\S+index\.npy"),
        ("train-000004.tar", None, r"\S+train-000004\.tar is gone, and its index\.json has it \(1 such\)"),
    ],
)
@pytest.mark.parametrize("unreadable", ["fail", "skip"])
def test_what_an_index_has_is_missed(copy, monkeypatch, name, content, message, unreadable):
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    monkeypatch.chdir(copy.parent)
    with pytest.raises(ValueError, match=message):
        load_data(config("copy", unreadable=unreadable), seed=0)


def test_some_of_the_shards_will_do_where_they_are_named(copy):
    for name in ("train-000004.tar", "val-000002.tar"):
        (copy / name).unlink()
    some = config(copy, train=f"{copy}/train-{{000000..000003}}.tar", validation=f"{copy}/val-00000[01].tar")
    with pytest.raises(ValueError, match=r"data\.train = .*train-000004\.tar is gone"):
        size_of(config(copy))
    data = load_data(some, seed=0)
    assert (len(data.train), len(data.validation)) == (16, 8)


def test_labels_of_all_parts_go_together(tmp_path):
    paths = {}
    for name, labels in (("train", (0, 1, 1)), ("validation", (0, 2))):
        members = [
            (f"{i}.{kind}", data) for i, k in enumerate(labels) for kind, data in (("jpg", JPEG), ("cls", b"%d" % k))
        ]
        paths[name] = str(write_tar(tmp_path / f"{name}.tar", members))
    with pytest.raises(ValueError, match=r"data\.validation = .*has a sample of class 2, and there are 2 classes"):
        load_data(config(tmp_path, **paths), seed=0)
    assert load_data(config(tmp_path, train=paths["validation"], validation=paths["train"]), seed=0).spec.classes == 3
    assert size_of(config(tmp_path, train="nowhere.tar", size=7)) == 7
    np.testing.assert_array_equal(held_out(0, 0.5), [])
