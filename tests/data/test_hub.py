"""Datasets of the Hugging Face library, from local files: the same samples as in the folder they were made of."""

from __future__ import annotations

import pickle

import pytest
import torch

from bigbatch.config.models import Folder, Hub, Text
from bigbatch.data import DataError, load_data, size_of

datasets = pytest.importorskip("datasets")

NAMES = ["cat", "dog"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("huggingface"))
        yield


@pytest.fixture(scope="module")
def known(folder):
    return load_data(Folder(name="folder", path=str(folder), shape=(3, 24, 24)), seed=0)


def table(part, **columns):
    source = part.source
    rows = {
        "image": [{"bytes": source.read(i), "path": None} for i in range(len(source))],
        "label": source.labels.tolist(),
        **columns,
    }
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=NAMES),
        **{name: datasets.Value("int64") for name in columns},
    )
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def parquet(known, tmp_path_factory):
    where = tmp_path_factory.mktemp("parquet")
    for split in ("train", "validation"):
        table(known.part(split), number=range(len(known.part(split)))).to_parquet(where / f"{split}-0.parquet")
    return where


@pytest.fixture(scope="module")
def saved(known, tmp_path_factory):
    where = tmp_path_factory.mktemp("saved")
    datasets.DatasetDict({split: table(known.part(split)) for split in ("train", "validation")}).save_to_disk(where)
    return where


def config(path, **changes):
    return Hub(name="hub", path=str(path), shape=(3, 24, 24), **changes)


def of_files(parquet, **changes):
    files = {split: (f"{parquet}/{split}-*.parquet",) for split in ("train", "validation")}
    return config("parquet", files=files, **changes)


def contents(part):
    return [(part.source.read(i), int(part.source.labels[i])) for i in range(len(part))]


@pytest.mark.parametrize("kind", ["parquet", "folder of parquet", "saved"])
def test_samples_are_those_of_the_folder(known, parquet, saved, kind):
    settings = {"parquet": of_files(parquet), "folder of parquet": config(parquet), "saved": config(saved)}[kind]
    found = load_data(settings, seed=0)
    assert (found.spec, size_of(settings), found.spec.names) == (known.spec, 20, ("cat", "dog"))
    for split in ("train", "validation"):
        assert contents(found.part(split)) == contents(known.part(split))
    index, epoch = torch.tensor([17, 3]), torch.tensor([0, 2])
    other = pickle.loads(pickle.dumps(found.train))
    for part in (found.train, other):
        assert torch.equal(part.gather(index, epoch)["image"], known.train.gather(index, epoch)["image"])
    assert found.train.source.name(3).endswith(":train[3]")
    assert found.test.source is found.validation.source


def test_a_share_of_the_training_split_validates(known, saved):
    settings = config(saved, validation=0.4)
    data = load_data(settings, seed=0)
    assert size_of(settings) == len(data.train)
    assert sorted(contents(data.train) + contents(data.validation)) == sorted(contents(known.train))
    names = [data.train.source.name(i) for i in range(len(data.train))]
    assert len(set(names)) == len(names) and not set(names) & {data.validation.source.name(0)}


def test_an_image_may_be_a_path_or_missing(known, folder, tmp_path):
    path = known.train.source.name(0)
    images = [{"bytes": None, "path": path}, {"bytes": None, "path": None}, None]
    features = datasets.Features(
        image={"bytes": datasets.Value("binary"), "path": datasets.Value("string")}, label=datasets.Value("int8")
    )
    made = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features=features)
    made.save_to_disk(tmp_path)
    data = load_data(config(tmp_path, validation="train", unreadable="skip"), seed=0)
    assert (data.spec.classes, data.spec.names) == (2, ())
    assert data.validation.gather(torch.arange(3))["index"].tolist() == [0]
    assert data.validation.problems == dict.fromkeys(
        [f"{tmp_path}:train[1]", f"{tmp_path}:train[2]"], "there is no image in it"
    )
    with pytest.raises(DataError, match=r":train\[2\]: cannot be read \(there is no image in it\)"):
        load_data(config(tmp_path, validation="train"), seed=0).train.gather(torch.tensor([2]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": "val"}, r"data\.validation = 'val' of data\.path = .*val"),
        ({"image": "picture"}, r"data\.image = 'picture': \S+:train has no such column; it has image, label, number"),
        ({"image": "label"}, r"data\.image = 'label': that column of \S+:train has no images"),
        ({"label": "image"}, r"data\.label = 'image': that column of \S+:train is Image.* class number"),
        ({"path": "no/such"}, r"data\.train = 'train' of data\.path = 'no/such'"),
        ({"path": "parquet"}, r"data\.path = 'parquet'"),
        ({"size": 21}, r"data\.size = 21: the data has 20 training samples"),
    ],
)
def test_what_is_not_there_is_named(parquet, changes, message):
    with pytest.raises(ValueError, match=message):
        load_data(config(**{"path": parquet, **changes}), seed=0)


@pytest.mark.parametrize("labels", [[0, 1, -1], [0, 1, None], ["cat", "dog", "cat"], [0.0, 1.0, 2.0]])
def test_labels_are_class_numbers(tmp_path, labels):
    made = datasets.Dataset.from_dict({"image": [{"bytes": b"", "path": None}] * 3, "label": labels})
    made.cast_column("image", datasets.Image()).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"data\.label = 'label': that column .*class_encode_column"):
        load_data(config(tmp_path, validation=0.5), seed=0)


@pytest.mark.parametrize("name", ["pandas", "text"])
def test_the_library_s_other_builders_are_no_names(name):
    with pytest.raises(ValueError, match=rf"(?s)path.*{name}: is no NAMESPACE/NAME"):
        config(name, files={"train": "x.pkl"})
    with pytest.raises(ValueError, match=rf"(?s)hub.*{name}: is no NAMESPACE/NAME"):
        Text(name="text", hub=name)


def test_a_plan_can_be_made_without_the_data():
    assert size_of(config("no/such", size=7)) == 7
