"""Two hosts, a cable that is cut: nobody hangs, and what comes back goes on."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from launch.hosts import Hosts, address, hosts, missing
from runs.command import bigbatch, events, summary

pytestmark = pytest.mark.cluster

TIMEOUT = 10

RECIPE = """
seed: 3
duration: 300st
batch: {global: 64}
optim: {name: lars, lr: 0.5, trust_coefficient: 0.02}
task: {name: classification, model: bigbatch/resnet_small, options: {widths: [4]}}
norm: {span: 32}
data: {name: digits}
eval: {every: 300st}
checkpoint: {every: 20st}
tracking: {console: none}
"""


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{RECIPE}\nrun: {{dir: {tmp_path / 'run'}, lease: 5}}\nparallel: {{timeout: {TIMEOUT}}}\n")
    return path


def launch(network: Hosts, number: int, recipe: Path, *overrides: str, restarts: int):
    command = [sys.executable, "-m", "bigbatch", "launch", str(recipe), "--nproc", "1", "--nnodes", "2"]
    command += ["--head", address(1), "--max-restarts", str(restarts), *overrides]
    return network.run(number, command, log=recipe.with_name(f"n{number}.log"))


def until(condition, *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def saved(run: Path, step: int) -> bool:
    return any(path.name.isdecimal() and int(path.name) >= step for path in run.glob("checkpoints/*"))


def test_a_cut_for_good_ends_both_sides(recipe: Path, tmp_path: Path) -> None:
    with hosts(2) as network:
        both = [launch(network, number, recipe, "duration=20000st", restarts=0) for number in (1, 2)]
        until(lambda: saved(tmp_path / "run", 40))
        network.cut(2)
        # With TCP's default settings torchrun's agents hang for a quarter of an hour.
        assert [process.wait(timeout=2 * TIMEOUT) for process in both] == [1, 1]
    # Each side names the host it misses.
    assert "host n2" in (tmp_path / "n1.log").read_text()
    assert f"host {address(1)} (MASTER_ADDR) does not answer" in (tmp_path / "n2.log").read_text()


def test_what_comes_back_goes_on(recipe: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    with hosts(2) as network:
        both = [launch(network, number, recipe, restarts=2) for number in (1, 2)]
        until(lambda: saved(run, 40))
        network.cut(2)
        logs = [tmp_path / f"n{number}.log" for number in (1, 2)]
        until(lambda: all("starting again" in log.read_text() for log in logs), seconds=2 * TIMEOUT)
        assert not saved(run, 300)
        network.heal(2)
        assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert bigbatch("launch", str(recipe), "--nproc", "2", f"run.dir={whole}").returncode == 0
    assert summary(run)["parameters_sha256"] == summary(whole)["parameters_sha256"]
    assert [event["step"] for event in events(run, "step")] == list(range(1, 301))
