"""examples/ does what it says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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


def test_it_trains_learns_and_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", *RECIPE, f"run.dir={tmp_path}"]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"]["r2"] > 0.4
    assert main(["checkpoint", "export", str(tmp_path), str(tmp_path / "model")]) == 0
    monkeypatch.chdir(tmp_path / "model")
    names: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    exec(code, names)
    assert names["model"](torch.zeros(2, 10)).shape == (2, 1)


def test_it_is_the_same_run_in_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *RECIPE, "--layouts", "1x2,2x1", "--steps", "5"]) == 0
    assert "the same run in all layouts" in capsys.readouterr().out
