"""Class folders: what counts as a sample, and what is wrong with them."""

from __future__ import annotations

import os

import pytest

from bigbatch.config.models import Folder
from bigbatch.data.listing import list_other, list_train
from bigbatch.data.size import size_of


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def folder(root, **settings):
    return Folder(name="folder", path=str(root), **settings)


TWO = ("train/b/1.jpg", "train/a/2.PNG", "train/a/10.JpEg", "val/a/1.jpg", "val/b/1.webp")


def test_samples_are_images_in_order_whatever_the_disk_says(tmp_path):
    touch(tmp_path, *TWO, "train/a/deep/x.tiff", "train/a/notes.txt", "train/a/.x.jpg", "train/.cache/y.jpg")
    touch(tmp_path, "train/README.md", "elsewhere/3.bmp")
    os.symlink(tmp_path / "elsewhere", tmp_path / "train" / "c")
    os.symlink(tmp_path / "train", tmp_path / "train" / "a" / "again")
    for loop in ("train/loop", "train/a/loop"):
        os.symlink("loop", tmp_path / loop)
    train, validation = list_train(folder(tmp_path))
    assert train.classes == validation.classes == ("a", "b", "c")
    assert train.files == (("10.JpEg", "2.PNG", os.path.join("deep", "x.tiff")), ("1.jpg",), ("3.bmp",))
    assert validation.files == (("1.jpg",), ("1.webp",), ())
    assert size_of(folder(tmp_path)) == len(train) == 5


def test_a_share_of_training_images_stays_out_and_no_new_one_moves_another(tmp_path):
    touch(tmp_path, *(f"train/{k}/{i}.jpg" for k in "ab" for i in range(200)))
    config = folder(tmp_path, validation=0.25)
    train, validation = list_train(config)
    held = set(validation.files[0])
    assert set(train.files[0]) | held == {f"{i}.jpg" for i in range(200)} and not set(train.files[0]) & held
    assert held != set(validation.files[1])  # the class has its say
    assert 60 < len(validation) < 140 and size_of(config) == len(train) == 400 - len(validation)
    touch(tmp_path / "more", *(f"train/{k}/{i}.jpg" for k in "ab" for i in range(300)))
    more = list_train(folder(tmp_path / "more", validation=0.25))[1].files[0]
    assert held == {name for name in more if int(name[:-4]) < 200}


def test_classes_of_other_folders_are_those_of_training(tmp_path):
    touch(tmp_path, *TWO, "last/b/1.jpg", "odd/b/1.jpg", "odd/bird/1.jpg")
    classes = ("a", "b")
    assert list_other(folder(tmp_path), "last", key="data.test", classes=classes).files == ((), ("1.jpg",))
    with pytest.raises(ValueError, match=r"data\.test = 'odd': bird in .*not among the 2 classes of training"):
        list_other(folder(tmp_path), "odd", key="data.test", classes=classes)


def test_the_size_counts_where_there_are_no_images(tmp_path):
    assert size_of(folder(tmp_path / "none", size=1_281_167)) == 1_281_167
    with pytest.raises(ValueError, match=r"data\.train = 'train': .* is no folder; .*data\.size=N"):
        size_of(folder(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"data\.size = 4: the data has 3 training samples"):
        size_of(folder(touch(tmp_path, *TWO), size=4))


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        (["train/x.txt"], {}, r"data\.train = 'train': .*no class folders"),
        (["train/a/1.jpg"], {"validation": 0.5}, r"the class folder a alone"),
        ([*TWO, "train/void/x.txt"], {}, r"data\.train = 'train': void in .*: no images .*\.jpg"),
        (TWO, {"validation": 0.001}, r"data\.validation = 0\.001: .*no images to validate on"),
        (TWO, {"validation": 0.999}, r"data\.train = 'train': a, b in .*no images that data\.validation = 0\.999"),
        ([*TWO, "train/5.jpg", "train/6.jpg"], {}, r"5\.jpg, 6\.jpg in .*no class folder; move"),
        ([*TWO, "val/c/1.jpg"], {}, r"data\.validation = 'val': c in .*not among the 2 classes"),
        (TWO[:3], {}, r"data\.validation = 'val': .*is no folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(tmp_path, files, settings, message):
    with pytest.raises(ValueError, match=message):
        size_of(folder(touch(tmp_path, *files), **settings))
