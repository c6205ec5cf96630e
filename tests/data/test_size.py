from __future__ import annotations

import gzip
import subprocess
import sys

import pytest

from bigbatch.config.models import Digits, Idx, Synthetic
from bigbatch.data import load_data, size_of


def idx(path, **options):
    return Idx(name="idx", path=str(path), **{"validation": 5, **options})


def test_sizes_need_no_array_library():
    code = (
        "import sys\nfrom bigbatch.data import size_of\nfrom bigbatch.config.models import Digits\n"
        "assert size_of(Digits(name='digits')) == 1085\n"
        "print([name for name in ('torch', 'sklearn', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_unknown_name_is_an_attribute_error():
    import bigbatch.data

    assert all(hasattr(bigbatch.data, name) for name in bigbatch.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bigbatch.data.nothing


@pytest.mark.parametrize("config", [Digits(name="digits"), Synthetic(name="synthetic", size=33)])
def test_size_is_that_of_the_loaded_training_part(config):
    assert size_of(config) == len(load_data(config, seed=0).train)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_size_comes_from_the_header_alone(plant, encode, packed):
    header_only = encode([0] * 20)[:8]
    folder = plant(packed=packed, train_labels=header_only, train_images=b"")
    assert size_of(idx(folder)) == 15


def test_plain_file_comes_before_gzipped_one(plant, encode):
    folder = plant()
    (folder / "train-labels-idx1-ubyte").write_bytes(encode([0] * 30))
    assert size_of(idx(folder)) == 25


def test_first_folder_with_all_four_files_counts(plant):
    part, whole, later = plant("part", test_images=None), plant("whole", train=30), plant("later", train=40)
    config = Idx(name="idx", path=(str(part), str(whole), str(later)), validation=5)
    assert size_of(config) == 25


def test_size_given_where_the_data_is_not_at_hand(tmp_path):
    assert size_of(idx(tmp_path / "none", size=777)) == 777


def test_size_that_contradicts_the_data(plant):
    with pytest.raises(ValueError, match=r"data\.size = 14: the data has 15 training samples; write data\.size=15"):
        size_of(idx(plant(), size=14))
    with pytest.raises(ValueError, match=r"data\.size = 1797: the data has 1085"):
        size_of(Digits(name="digits", size=1797))
    assert size_of(idx(plant(), size=15)) == 15


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_size_of_what_will_be_downloaded_is_known(tmp_path, name):
    assert size_of(Idx(name="idx", path=str(tmp_path), download=name)) == 55_000
    with pytest.raises(ValueError, match="has 55000"):
        size_of(Idx(name="idx", path=str(tmp_path), download=name, size=60_000))


def test_missing_files_name_folders_and_ways_out(plant, tmp_path):
    part = plant("part", test_labels=None)
    config = Idx(name="idx", path=(str(tmp_path / "none"), str(part)))
    with pytest.raises(ValueError) as error:
        size_of(config)
    message = str(error.value)
    assert message.startswith("data.path = (")
    assert f"{tmp_path / 'none'} (lacks train-images-idx3-ubyte, " in message
    assert f"{part} (lacks t10k-labels-idx1-ubyte)" in message
    for way_out in ("apt-get install dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist", "data.size=N"):
        assert way_out in message
    assert "data.download=fashion_mnist" in message


@pytest.mark.parametrize("path", ["~nobody/data", "a/" * 3000, "a\0b", "\ud800"])
def test_a_path_that_cannot_be_one_has_no_files(path):
    with pytest.raises(ValueError, match=r"data\.path = .*no folder has the four idx files"):
        size_of(idx(path))


@pytest.mark.parametrize("validation", [20, 21])
def test_validation_that_leaves_nothing(plant, validation):
    with pytest.raises(ValueError, match=rf"data\.validation = {validation}: leaves none of 20 images to train on"):
        size_of(idx(plant(), validation=validation))
    assert size_of(idx(plant(), validation=19)) == 1


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "magic nothing, expected 00000801"),
        (b"\0\0\x08\x03" + bytes(12), "magic 00000803, expected 00000801"),
        (b"\0\0\x08\x01\0\0", "a header of 6 bytes, expected 8"),
    ],
)
def test_damaged_header(plant, content, found):
    folder = plant(train_labels=content)
    with pytest.raises(ValueError, match=f"{folder / 'train-labels-idx1-ubyte.gz'}: found {found}"):
        size_of(idx(folder))


@pytest.mark.parametrize("content", [b"not gzip at all", gzip.compress(bytes(100))[:11]])
def test_damaged_archive(plant, content):
    folder = plant()
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz: cannot be read \("):
        size_of(idx(folder))
