"""Reading ahead in other processes: the same batches, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from bigbatch.config.models import Augment, Digits
from bigbatch.data import DataError, Dataset, Stream, load_data
from bigbatch.data.reader import Reader
from bigbatch.spec import Spec
from images import image_loader

DIGITS = load_data(Digits(name="digits"), seed=0)
WINDOW = range(0, 80)
REQUESTS = [(range(low, min(low + 32, 80)), WINDOW) for low in (0, 32, 64)]


class Mortal:
    """Samples that are their own number; reading one below ``deadly`` kills the process that does, ``lives`` times."""

    def __init__(self, folder: Path, *, deadly=0, lives=0, slow=0.0):
        self.folder, self.deadly, self.lives, self.slow = folder, deadly, lives, slow

    def __len__(self):
        return 40

    def gather(self, index, epoch=None):
        if int(index.min()) < self.deadly and len(list(self.folder.iterdir())) < self.lives:
            (self.folder / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.slow)
        return {"number": index + 100, "pid": torch.full_like(index, os.getpid())}


def numbers(part):
    return Dataset(part, part, part, Spec((), 1), kind="plain")


def loader(workers):
    stream = Stream(len(DIGITS.train), seed=4, epoch_samples=len(DIGITS.train))
    augment = Augment(shift=1, flip=True, mixup=0.2)
    cpu, double = torch.device("cpu"), torch.float64
    return image_loader(DIGITS, stream=stream, augment=augment, seed=4, device=cpu, dtype=double, workers=workers)


@pytest.fixture(scope="module")
def ahead():
    made = loader(3)
    yield made
    made.close()


@pytest.mark.parametrize("foretold", [REQUESTS, REQUESTS[1:], [*REQUESTS, *REQUESTS], []])
def test_batches_are_those_of_one_process(ahead, foretold):
    alone = loader(0)
    for each in (alone, ahead):
        each.follow(iter(foretold))
    for positions, window in REQUESTS:
        known, found = (each.train(positions, window=window) for each in (alone, ahead))
        assert found.keys() == known.keys() and all(torch.equal(found[name], known[name]) for name in known)
        # What was not foretold comes between, and disturbs nothing.
        assert torch.equal(ahead.train(range(5))["image"], alone.train(range(5))["image"])
    known, found = (list(each.evaluate("test", rank=1, world_size=2, batch=50)) for each in (alone, ahead))
    assert [batch["index"].tolist() for batch in found] == [batch["index"].tolist() for batch in known]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(found, known, strict=True))


def test_a_worker_that_dies_is_replaced(tmp_path):
    reader = Reader(numbers(Mortal(tmp_path, deadly=5, lives=2)), workers=2, pin=False)
    asked = [reader.start("train", torch.arange(low, low + 8)) for low in (0, 8, 16)]
    assert [read()["number"].tolist() for read in asked] == [list(range(100 + low, 108 + low)) for low in (0, 8, 16)]
    assert len(list(tmp_path.iterdir())) == 2
    reader.close()


def test_samples_that_kill_whoever_reads_them_are_named(tmp_path):
    reader = Reader(numbers(Mortal(tmp_path, deadly=5, lives=100)), workers=1, pin=False)
    with pytest.raises(DataError, match=r"die over the 6 samples from number 3 on .*data\.workers"):
        reader.start("train", torch.arange(3, 9))()
    reader.close()


def test_more_is_read_ahead_than_the_soft_limit_has_files(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = Reader(numbers(Mortal(tmp_path)), workers=1, pin=False)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        begun = [reader.start("train", torch.tensor([i])) for i in range(80)]
        batches = [read() for read in begun]  # as many are held at once
    finally:
        reader.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [int(batch["number"]) for batch in batches] == list(range(100, 180))


def own_and_wait(folder, pipe):
    reader = Reader(numbers(Mortal(folder, slow=0.05)), workers=2, pin=False)
    pids = set()
    while len(pids) < 2:  # one that is still starting has not yet said that it passes over signals
        pids.update(reader.start("train", torch.arange(8))()["pid"].tolist())
    pipe.send(list(pids))
    while True:  # still reading when the owner is killed
        reader.start("train", torch.arange(8))()


def test_workers_end_with_their_owner(tmp_path):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    owner = multiprocessing.get_context("forkserver").Process(target=own_and_wait, args=(tmp_path, theirs))
    owner.start()
    workers = [psutil.Process(pid) for pid in ours.recv()]
    for worker in workers:
        worker.send_signal(signal.SIGUSR1)
        worker.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert all(worker.is_running() for worker in workers)
    owner.kill()
    owner.join()
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert (len(gone), alive) == (2, [])


def read_while_asked_to_stop(folder, pipe):
    os.setsid()
    for asked in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(asked, lambda *_: None)
        threading.Timer(0.3, os.killpg, (0, asked)).start()  # the fork server takes longer to start
    reader = Reader(numbers(Mortal(folder)), workers=2, pin=False)
    pipe.send(reader.start("train", torch.arange(8))()["number"].tolist())  # and leaves without closing it


@pytest.mark.cluster
def test_signals_that_ask_a_run_to_stop_leave_its_workers_to_start(tmp_path):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    # spawned, since a child of a fork server starts its own from that one
    owner = multiprocessing.get_context("spawn").Process(target=read_while_asked_to_stop, args=(tmp_path, theirs))
    owner.start()
    theirs.close()
    assert ours.recv() == list(range(100, 108))
    owner.join(20)
    assert owner.exitcode == 0
