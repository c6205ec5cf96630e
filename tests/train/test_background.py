"""Saves that go on while training does: what they hold, what they say, and what is left of them after a kill."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.dist.local import PRELOAD
from bigbatch.signals import StopSignal
from bigbatch.train import RunError, train
from bigbatch.train.checkpoint import Checkpoints, on_host
from bigbatch.train.saved import open_checkpoint
from train.assembled import assembled

checkpoint_module = sys.modules["bigbatch.train.checkpoint"]


def background(root: Path, **options: Any) -> Checkpoints:
    return Checkpoints(root, keep=2, best="accuracy", best_is="max", write="background", **options)


def contents(value: float) -> dict[str, Any]:
    momentum = torch.full((4,), value)
    optimizer = {"state": {0: {"momentum": momentum}}, "param_groups": [{"lr": value, "params": [0]}]}
    return {"model": {"w": torch.full((4,), value)}, "optimizer": optimizer, "state": {"samples": 96, "list": [value]}}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The disk is so slow that nothing is written until this is set."""
    gate, write = threading.Event(), checkpoint_module.save_file
    monkeypatch.setattr(checkpoint_module, "save_file", lambda *args: (gate.wait(60), write(*args)))
    return gate


def test_a_save_holds_what_was_there_when_it_began(tmp_path: Path, gate: threading.Event) -> None:
    checkpoints, parts = background(tmp_path), contents(1.0)
    path = checkpoints.save(1, **parts)
    parts["model"]["w"].fill_(9.0)
    parts["optimizer"]["state"][0]["momentum"].fill_(9.0)
    parts["optimizer"]["state"][1] = {}
    parts["optimizer"]["param_groups"][0]["lr"] = 9.0
    parts["state"]["list"].append(9.0)
    assert not path.exists() and not checkpoints.events
    gate.set()
    assert checkpoints.wait() is None
    found = open_checkpoint(path)
    assert found.model()["w"].tolist() == found.optimizer()["state"][0]["momentum"].tolist() == [1.0] * 4
    assert found.optimizer()["param_groups"] == [{"lr": 1.0, "params": [0]}] and len(found.optimizer()["state"]) == 1
    assert found.state == {"owner": 0, "samples": 96, "list": [1.0], "step": 1}


def test_the_second_save_waits_for_the_first(tmp_path: Path, gate: threading.Event) -> None:
    checkpoints = background(tmp_path)
    checkpoints.save(1, **contents(1.0))
    second = threading.Thread(target=checkpoints.save, args=(2,), kwargs=contents(2.0))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join()
    assert checkpoints.wait() is None
    assert [open_checkpoint(path).model()["w"][0].item() for path in checkpoints.paths()] == [1.0, 2.0]
    first, last = checkpoints.events
    assert (first["event"], first["step"], last["step"], last["samples"]) == ("checkpoint", 1, 2, 96)
    assert all(event[key] >= 0 for event in (first, last) for key in ("stall_seconds", "write_seconds"))


@pytest.mark.parametrize("write", ["background", "foreground"])
def test_a_save_that_fails_says_so_and_the_next_one_tries_again(
    tmp_path: Path, write: Literal["background", "foreground"]
) -> None:
    root = tmp_path / "checkpoints"
    root.write_text("in the way")
    checkpoints = Checkpoints(root, keep=2, best="accuracy", best_is="max", write=write)
    checkpoints.save(1, **contents(1.0))
    error = checkpoints.wait()
    assert isinstance(error, RunError) and "00000001 cannot be written" in str(error)
    root.unlink()
    checkpoints.save(2, **contents(2.0))
    assert checkpoints.wait() is None
    warning, saved = checkpoints.events
    assert (warning["code"], warning["step"], warning["message"]) == ("checkpoint_failed", 1, str(error))
    assert (saved["event"], saved["step"]) == ("checkpoint", 2)


@pytest.mark.parametrize("kind", [MemoryError, RuntimeError, OSError])
def test_no_memory_for_a_copy_costs_the_save_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def full(*_: Any) -> Any:
        raise kind("no memory left")

    checkpoints = background(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "on_host", full)
        checkpoints.save(1, **contents(1.0))
    error = checkpoints.wait()
    assert isinstance(error, RunError) and "00000001 cannot be written: no memory left" in str(error)
    checkpoints.save(2, **contents(2.0))
    assert checkpoints.wait() is None and [path.name for path in checkpoints.paths()] == ["00000002"]
    assert [event.get("code") for event in checkpoints.events] == ["checkpoint_failed", None]


def test_a_checkpoint_takes_its_name_only_if_the_check_passes(tmp_path: Path) -> None:
    def lost() -> None:
        raise RunError("run.dir was taken over")

    checkpoints = background(tmp_path, check=lost)
    checkpoints.save(1, **contents(1.0))
    assert "taken over" in str(checkpoints.wait())
    assert list(tmp_path.iterdir()) == []


tensors = st.builds(
    lambda shape, dtype, seed: torch.randint(9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.integers(0, 99),
)
trees = st.recursive(
    tensors | st.none() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one is not two and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


@settings(max_examples=30, derandomize=True)
@given(trees, trees)
def test_a_copy_is_equal_whatever_was_copied_before(first: Any, second: Any) -> None:
    assert same(first, on_host(first))
    assert same(second, on_host(second, on_host(first)))


def test_a_copy_is_made_in_the_memory_of_the_one_before(tmp_path: Path) -> None:
    last = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    before = on_host({"a": torch.ones(3), "b": [last], "c": torch.ones(2)})
    after = on_host({"a": torch.zeros(3), "b": [last * 2], "c": torch.ones(3)}, before)
    assert after["a"] is before["a"] and after["b"][0] is before["b"][0] and after["c"] is not before["c"]
    # A momentum goes on in the memory format of its weight.
    assert after["b"][0].stride() == last.stride() and torch.equal(after["b"][0], last * 2)


def save_on_and_on(root: Path, connection: Connection) -> None:
    """Two checkpoints in turn, each a function of its step, until a signal ends it."""
    checkpoints = background(root)
    step = max((int(path.name) for path in checkpoints.paths()), default=0)
    try:
        while True:
            step += 1
            checkpoints.save(step, **contents(float(step)))
            connection.send(step)
    except KeyboardInterrupt:
        checkpoints.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_signal_at_any_moment_leaves_whole_checkpoints_alone(tmp_path: Path, number: signal.Signals) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    draw, interrupted = random.Random(0), 0
    for _ in range(3):
        ours, theirs = context.Pipe()
        process = context.Process(target=save_on_and_on, args=(tmp_path, theirs))
        process.start()
        for _ in range(draw.randint(3, 6)):  # that so many were begun means that all but one were written
            ours.recv()
        time.sleep(0.01 * draw.random())
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join()
        checkpoints = background(tmp_path)
        found, damage = checkpoints.newest()
        assert found is not None and damage == []
        for path in checkpoints.paths():
            whole = open_checkpoint(path)
            assert whole.model()["w"].tolist() == [float(whole.state["step"])] * 4
        interrupted += any(path.name.startswith(".") for path in tmp_path.iterdir())
    if number == signal.SIGKILL:
        assert interrupted, "no kill fell into a save"
        checkpoints.save(10**6, **contents(0.0))
        assert checkpoints.wait() is None
    assert len(checkpoints.paths()) == len(list(tmp_path.iterdir())) in (2, 3)


def test_background_and_foreground_save_the_same(tmp_path: Path) -> None:
    def run(write: str) -> list[Any]:
        folder = tmp_path / write
        sections = {"run": {"dir": str(folder)}, "checkpoint": {"every": "4st", "write": write}, "duration": "1ep"}
        train(assembled(tracking={"console": "none"}, **sections), StopSignal(grace=60.0))
        saves = [open_checkpoint(path) for path in background(folder / "checkpoints").paths()]
        return [[save.path.name, save.model(), save.optimizer()] for save in saves]

    ours, theirs = run("background"), run("foreground")
    assert [name for name, *_ in ours] == ["00000008", "00000012"]
    assert same(ours, theirs)
