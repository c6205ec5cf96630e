"""Shards are written once and whole: by which settings, and after which accidents, shows in no byte of them."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from bigbatch.cli import OK, USAGE, main
from bigbatch.config.models import Shards
from bigbatch.data import load_data
from bigbatch.data.cache import Cache
from bigbatch.data.index import find
from bigbatch.data.shards import ShardSource
from bigbatch.data.write import write_shards
from pictures import BAD, JPEG, encoded, pixels

SETTINGS = {"size": 14_000, "seed": 3}


def nothing(done, total):
    pass


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(source, dest, **changes):
    return write_shards(source, dest, **{**SETTINGS, "progress": nothing, **changes})


def begin(source, dest):
    write(source, dest)


def test_what_was_killed_goes_on_and_is_the_same(folder, dest, tmp_path):
    source, begun = shutil.copytree(folder, tmp_path / "source"), tmp_path / "begun"
    os.mkfifo(tmp_path / "fifo")  # reading it takes until we are done
    victim = source / "val" / "dog" / "00.jpg"
    whole = victim.read_bytes()
    victim.unlink()
    (tmp_path / "fifo").rename(victim)

    writer = multiprocessing.get_context("forkserver").Process(target=begin, args=(source, begun))
    writer.start()
    while len(list(begun.glob("*.tar"))) < 5:
        assert writer.is_alive()
        time.sleep(0.01)
    others = psutil.Process(writer.pid).children(recursive=True)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert psutil.wait_procs(others, timeout=20)[1] == []
    there = {path: path.stat().st_mtime_ns for path in begun.glob("*.tar")}
    assert 5 <= len(there) < 8 and (begun / "unfinished.json").exists() and not (begun / "index.json").exists()
    assert list(begun.glob(".*.part"))
    with pytest.raises(ValueError, match=r"data\.train = .*bigbatch shard has not finished \S+begun; run it again"):
        settings = {"train": f"{begun}/train-*.tar", "validation": 0.5, "cache": str(tmp_path)}
        load_data(Shards(name="shards", **settings), seed=0)

    victim.unlink()
    victim.write_bytes(whole)
    write(source, begun)
    assert bytes_of(begun) == bytes_of(dest)
    assert {path: path.stat().st_mtime_ns for path in there} == there


def test_the_command_writes_an_index_of_whole_shards(folder, dest, tmp_path, capsys):
    made = tmp_path / "made"
    command = ["shard", str(folder), str(made), "--size", "14KB", "--seed", "3"]
    assert main([*command, "--workers", "2"]) == OK
    assert "20 of train and 12 of val in 8 shards of up to 4 images" in capsys.readouterr().out
    assert bytes_of(made) == bytes_of(dest)
    index = json.loads((made / "index.json").read_text())
    assert (index["classes"], index["splits"]) == (["cat", "dog"], {"train": 20, "val": 12})
    for shard in index["shards"]:
        data = (made / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert main(command) == OK
    assert bytes_of(made) == bytes_of(dest)
    assert main([*command, "--seed", "4"]) == USAGE
    assert main(["shard", str(tmp_path / "no"), str(tmp_path / "made2")]) == USAGE


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"size": 15_000}, "size"),
        ({"seed": 4}, "seed"),
        ({"resize": 20}, "resize"),
        ({"splits": ["train"]}, "splits"),
    ],
)
def test_a_destination_of_other_settings_is_refused(folder, dest, tmp_path, change, what, finished):
    made = shutil.copytree(dest, tmp_path / "made")
    if not finished:
        (made / "index.json").rename(made / "unfinished.json")
    before = bytes_of(made)
    with pytest.raises(ValueError, match=rf"made: was begun with another {what}; repeat that command"):
        write(folder, made, **change)
    assert bytes_of(made) == before


def test_so_is_one_of_another_source_or_with_other_files(folder, dest, tmp_path):
    made = shutil.copytree(dest, tmp_path / "made")
    other = shutil.copytree(folder, tmp_path / "other")
    write(other, made)  # the same images elsewhere
    (other / "train" / "cat" / "00.jpg").write_bytes(encoded(pixels(77)))
    with pytest.raises(ValueError, match="was begun with another source"):
        write(other, made)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"new: has other files in it; give a new folder"):
        write(folder, tmp_path / "new")


def test_a_shard_that_is_not_what_was_written_is_named(folder, dest, tmp_path):
    made = shutil.copytree(dest, tmp_path / "made")
    (made / "index.json").rename(made / "unfinished.json")
    shutil.copy(made / "train-000001.tar", made / "train-000002.tar")
    with pytest.raises(ValueError, match=r"train-000002\.tar: is not the shard that was written; delete it"):
        write(folder, made)


@pytest.mark.parametrize(
    ("made", "splits", "message"),
    [
        (("train/cat/a.jpg", "val/fox/a.jpg"), None, r"train has no class 'fox', and another split has"),
        (("train/cat/a.jpg", "train/fox/a.txt"), None, r"train has a class folder without images"),
        (("train/cat/a.jpg", "train/b.jpg"), None, r"b\.jpg in \S+train: no class folder"),
        (("train/cat/a.jpg",), ["train", "val"], r"--splits = 'val': \S+val is no folder"),
        (("train/a.txt",), None, r"train has a class folder without images, or none at all"),
        (("cat/a.jpg",), None, r"has no folder train, val, test"),
    ],
)
def test_a_source_that_will_not_do(tmp_path, made, splits, message):
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JPEG)
    with pytest.raises(ValueError, match=message):
        write(tmp_path, tmp_path / "made", splits=splits)
    assert not (tmp_path / "made").exists()


def test_large_jpegs_can_be_made_smaller(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "wide": encoded(pixels(1, 60, 90), quality=95),
        "turned": encoded(pixels(2, 60, 90), quality=95, exif=turned),
        "low": encoded(pixels(3, 30, 90)),
        "png": encoded(pixels(4, 60, 90), "PNG"),
        **{name: data for name, (data, _) in BAD.items()},
    }
    (tmp_path / "source" / "all" / "cat").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "source" / "all" / "cat" / f"{name}.jpg").write_bytes(data)
    cache = Cache(str(tmp_path))
    whole, smaller = (
        ShardSource(find(f"{tmp_path / name}/all-*.tar", key="data.train", cache=cache), cache=cache)
        for name, resize in (("whole", None), ("smaller", 32))
        if write(tmp_path / "source", tmp_path / name, splits=["all"], resize=resize)
    )
    made = {whole.read(i): smaller.read(i) for i in range(len(whole))}
    assert {name for name, data in files.items() if made[data] != data} == {"wide", "turned"}
    for name, orientation in (("wide", None), ("turned", 6)):
        image = Image.open(io.BytesIO(made[files[name]]))
        assert (image.size, image.getexif().get(0x0112)) == ((48, 32), orientation)
        known = Image.open(io.BytesIO(files[name])).resize((48, 32), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(known)).mean() < 3
