"""examples/ does what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bigbatch.cli import main
from bigbatch.custom import ALLOW
from test_floors import lines_of_code

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = ["diabetes.yaml", "--allow-custom", "tracking.console=none"]


@pytest.fixture(autouse=True)
def _beside_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(ALLOW, "0")


def test_it_is_thirty_lines() -> None:
    assert lines_of_code((EXAMPLES / "diabetes.py").read_text()) <= 30


def test_it_trains_and_learns(tmp_path: Path) -> None:
    assert main(["train", *RECIPE, f"run.dir={tmp_path}"]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"]["r2"] > 0.4


def test_it_is_the_same_run_in_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *RECIPE, "--layouts", "1x2,2x1", "--steps", "5"]) == 0
    assert "the same run in all layouts" in capsys.readouterr().out
