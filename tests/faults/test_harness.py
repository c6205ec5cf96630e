"""The tool that breaks runs, for a few runs; by hand it takes hundreds (`python tests/faults/harness.py --help`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from faults import harness

HARNESS = Path(harness.__file__)


@pytest.mark.cluster
def test_broken_runs_end_as_the_one_that_was_let_be(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["umount", tmp_path], check=True)
    faults = ["kill"] + ["disk"] * mounted
    done = subprocess.run(
        [sys.executable, str(HARNESS), *faults, "--times", "2", "--work", str(tmp_path / "work")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()[2:]
    assert [line.split()[0] for line in lines] == faults
    for line in lines:
        *struck, _, runs, equal = map(int, line.split()[1:])
        assert sum(struck) == 2 and runs == equal


def test_a_run_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The harness's own fault: another seed."""

    def other(run: harness.Run, draw: object, seconds: float, times: int) -> None:
        run.overrides = ("seed=4",)
        run.struck["starting"] += 1
        run.complete()

    monkeypatch.setitem(harness.FAULTS, "other", other)
    monkeypatch.setattr(harness, "RECIPE", harness.RECIPE.replace("8ep", "1ep"))
    assert harness.main(["other", "--times", "1", "--ranks", "1"]) == 1
    assert "are not the undisturbed run's" in capsys.readouterr().out
