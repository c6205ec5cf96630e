"""Whoever reads what a run prints may leave: the run goes on, and its exit code is its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from runs.command import ROOT, command, environment, summary

RECIPE = """
duration: 3st
batch: {global: 64}
optim: {name: sgd, lr: 0.1}
task: {name: classification, model: bigbatch/resnet_small, options: {widths: [4]}}
data: {name: digits}
tracking: {console: lines}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def code_without_reader(*arguments: str, **variables: str) -> int:
    """Exit code of a command that writes to a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    here = {**environment(), **variables}
    try:
        return subprocess.run(command(*arguments), cwd=ROOT, env=here, stdout=writer, stderr=writer).returncode
    finally:
        os.close(writer)


def test_training_goes_on_without_a_reader(recipe: Path, tmp_path: Path) -> None:
    assert code_without_reader("train", str(recipe), f"run.dir={tmp_path / 'run'}") == 0
    assert summary(tmp_path / "run")["steps"] == 3


def test_training_goes_on_where_its_log_is_full(recipe: Path, tmp_path: Path) -> None:
    arguments = command("train", str(recipe), f"run.dir={tmp_path / 'run'}", "tracking.console=bar")
    with open("/dev/full", "w") as full:
        assert subprocess.run(arguments, cwd=ROOT, env=environment(), stdout=full, stderr=full).returncode == 0
    assert summary(tmp_path / "run")["steps"] == 3


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("arguments", "code"), [(["plan", "RECIPE"], 0), (["schema"], 0), (["plan", "no.yaml"], 2)])
def test_the_exit_code_needs_no_reader(arguments: list[str], code: int, unbuffered: str, recipe: Path) -> None:
    arguments = [str(recipe) if word == "RECIPE" else word for word in arguments]
    assert code_without_reader(*arguments, PYTHONUNBUFFERED=unbuffered) == code


def test_both_streams_are_closed(recipe: Path) -> None:
    started = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command("plan", str(recipe))]
    assert subprocess.run(started, cwd=ROOT, env=environment()).returncode == 0
