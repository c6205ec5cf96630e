"""Shards with URLs, from a real server: fetched whole or not at all, once, and as often as it takes."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ClassVar

import pytest
import torch

from bigbatch.config.models import Shards
from bigbatch.data import DataError, load_data, size_of
from bigbatch.data import cache as cache_file
from bigbatch.data.cache import Cache


class Handler(http.server.SimpleHTTPRequestHandler):
    """Counts what it is asked for; of names in ``cuts`` it sends half, so many times."""

    asked: ClassVar[Counter[str]] = Counter()
    busy: ClassVar[set[str]] = set()
    cuts: ClassVar[Counter[str]] = Counter()
    hidden: ClassVar[set[str]] = set()

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.asked[name] += 1
        if name in self.hidden:
            self.send_error(404)
        elif name in self.busy:
            self.send_error(503)
        else:
            super().do_GET()

    def copyfile(self, source, outputfile):
        name, data = self.path.rpartition("/")[2], source.read()
        if self.cuts[name] > 0:
            self.cuts[name] -= 1
            data = data[: len(data) // 2]
        outputfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server(dest):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=dest)) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    Handler.asked.clear()
    Handler.cuts.clear()
    Handler.hidden, Handler.busy = set(), set()
    monkeypatch.setattr(cache_file, "PAUSES", (0.0, 0.0))


def config(where, cache, **changes):
    options = {"train": f"{where}/train-{{000000..000004}}.tar", "validation": f"{where}/val-{{000000..000002}}.tar"}
    return Shards(name="shards", cache=str(cache), shape=(3, 24, 24), **{**options, **changes})


def contents(part):
    return [(part.source.read(i), int(part.source.labels[i])) for i in range(len(part))]


def tars():
    return {name: count for name, count in Handler.asked.items() if name.endswith(".tar")}


@pytest.mark.parametrize("hidden", [set(), {"index.json"}])
def test_each_shard_is_fetched_once_and_none_for_a_plan_with_an_index(server, dest, tmp_path, hidden):
    Handler.hidden = hidden
    settings = config(server, tmp_path / "cache")
    assert size_of(config(server, tmp_path / "cache", size=99)) == 99 and not Handler.asked
    assert size_of(settings) == 20
    assert bool(tars()) == bool(hidden)
    known = load_data(config(dest, tmp_path), seed=0)
    found = load_data(settings, seed=0)
    assert contents(found.train) == contents(known.train) and contents(found.validation) == contents(known.validation)
    assert tars() == {path.name: 1 for path in dest.glob("*.tar")}
    assert (found.spec.names == ("cat", "dog")) == (not hidden)
    with pytest.raises(ValueError, match=r"data\.size = 99: the data has 20"):
        load_data(config(server, tmp_path / "cache", size=99), seed=0)


def test_a_transfer_that_breaks_off_is_tried_again(server, dest, tmp_path):
    Handler.cuts["train-000001.tar"] = 2
    train = load_data(config(server, tmp_path), seed=0).train
    assert contents(train) == contents(load_data(config(dest, tmp_path), seed=0).train)
    assert tars()["train-000001.tar"] == 3
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("unreadable", ["fail", "skip"])
def test_one_that_always_does_ends_the_run(server, tmp_path, unreadable):
    Handler.cuts["train-000001.tar"] = 99
    train = load_data(config(server, tmp_path, unreadable=unreadable), seed=0).train
    message = r"train-000001\.tar:00000005: \S+/train-000001\.tar cannot be fetched: curl: \(18\) transfer closed"
    with pytest.raises(DataError, match=message):
        train.gather(torch.tensor([5]), torch.tensor([0]))
    assert tars() == {"train-000001.tar": 3}
    assert {path.name[17:] for path in (tmp_path / "fetched").iterdir() if path.suffix != ".lock"} == {
        "index.json",
        "index.npy",
    }


def test_a_shard_that_is_not_there_is_not_asked_for_again(server, tmp_path):
    Handler.hidden = {"train-000001.tar"}
    train = load_data(config(server, tmp_path), seed=0).train
    with pytest.raises(DataError, match=r"train-000001\.tar cannot be fetched: curl: .* 404"):
        train.gather(torch.tensor([5]), torch.tensor([0]))
    assert tars() == {"train-000001.tar": 1}


def test_a_shard_that_is_another_is_refused(server, dest, tmp_path):
    settings = config(server, tmp_path)
    index = json.loads((dest / "index.json").read_text())
    size_of(settings)
    (kept,) = (tmp_path / "fetched").glob("*-index.json")
    index["shards"][2]["sha256"] = "0" * 64
    kept.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"train-000002\.tar cannot be fetched: \d+ bytes came that are not the \d+ of"):
        load_data(settings, seed=0).train.gather(torch.tensor([8]))


def test_an_index_that_does_not_come_is_not_taken_for_none(server, tmp_path):
    Handler.busy = {"index.json"}
    with pytest.raises(ValueError, match=r"data\.train = .*index\.json cannot be fetched: curl: .* 503"):
        size_of(config(server, tmp_path))
    assert Handler.asked == {"index.json": 2}


def test_a_server_that_redirects_elsewhere_is_not_followed(dest, tmp_path):
    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", (dest / "train-000000.tar").as_uri())
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Elsewhere) as made:
        threading.Thread(target=made.handle_request).start()
        with pytest.raises(DataError, match=r"curl: \(1\)"):
            Cache(str(tmp_path)).open(f"http://127.0.0.1:{made.server_port}/x", attempts=1)


def test_a_plan_fetches_without_torch(server, tmp_path):
    code = f"""
import sys
from bigbatch.config.models import Shards
from bigbatch.data.size import size_of
config = Shards(name="shards", train="{server}/train-{{000000..000004}}.tar", validation=0.5, cache="{tmp_path}")
sys.exit(not 0 < size_of(config) < 20 or "torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert Handler.asked == {"index.json": 1, "index.npy": 1}


@pytest.mark.parametrize("url", ["pipe:touch {} ; echo ://a", "file://{}", "ftp://127.0.0.1/x", "-o{}"])
def test_nothing_but_the_web_is_fetched(tmp_path, url):
    with pytest.raises(ValueError, match="only https and http are fetched"):
        Cache(str(tmp_path / "cache")).open(url.format(tmp_path / "made"))
    assert not list(tmp_path.iterdir())


def test_without_curl(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.train = .*curl does not start \(.*; install it"):
        size_of(config(server, tmp_path))


def test_a_server_that_does_not_answer(tmp_path, server):
    with pytest.raises(ValueError, match=r"data\.train = .*http://127\.0\.0\.1:1/\S+ cannot be fetched: curl: \(7\)"):
        size_of(config("http://127.0.0.1:1", tmp_path))


def test_one_that_falls_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_file, "SILENCE", 1)
    monkeypatch.setattr(cache_file, "PAUSES", ())
    ours = threading.Event()

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x")
            self.wfile.flush()
            ours.wait(20)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as silent:
        threading.Thread(target=silent.serve_forever).start()
        with pytest.raises(DataError, match=r"cannot be fetched: curl: \(28\)"):
            Cache(str(tmp_path)).open(f"http://127.0.0.1:{silent.server_port}/x")
        ours.set()
        silent.shutdown()


def test_the_least_recently_opened_is_dropped(server, dest, tmp_path):
    one = (dest / "train-000000.tar").stat().st_size
    cache = Cache(str(tmp_path), limit=2 * one + one // 2)
    urls = [f"{server}/train-{number:06d}.tar" for number in range(4)]

    def open_(number):
        with open(cache.open(urls[number]), "rb") as file:
            assert file.read() == (dest / f"train-{number:06d}.tar").read_bytes()
        return sorted(path.name[-10:-4] for path in (tmp_path / "fetched").glob("*.tar"))

    assert [open_(number) for number in (0, 1, 0, 2, 0)][-2:] == [["000000", "000002"]] * 2
    assert open_(3) == ["000000", "000003"]
    held = cache.open(urls[1])
    assert open_(2) == ["000001", "000002"] and open_(0) == ["000000", "000002"]
    with open(held, "rb") as file:
        assert file.read() == (dest / "train-000001.tar").read_bytes()


def test_many_at_once_fetch_once(server, tmp_path):
    cache = Cache(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        for file in pool.map(cache.open, [f"{server}/train-000000.tar"] * 8):
            with open(file, "rb"):
                pass
    assert tars() == {"train-000000.tar": 1}


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache = \S+file': .*with room, to write to and to lock"):
        size_of(config(server, tmp_path / "file"))
