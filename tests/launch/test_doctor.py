"""``bigbatch doctor`` measures, and says what looks wrong."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest

from bigbatch.cli import doctor, main
from runs.command import bigbatch


def test_between_processes(tmp_path: Path) -> None:
    done = bigbatch("doctor", "--nproc", "2", "--dir", str(tmp_path / "not yet there"), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    facts = report["facts"]
    assert facts["torch"] == version("torch")
    assert "× 2 processes" in facts["threads"]
    assert float(facts["all-reduce 4 B"].split()[0]) > 0
    assert "GB/s" in facts["all-reduce 64 MiB"]
    assert f"free in {tmp_path}" in facts
    assert report["broken"] == []


def test_what_looks_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4096")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**29}))
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda number: (256, 256))
    assert main(["doctor"]) == 0
    lines = "".join(line for line in capsys.readouterr().out.splitlines() if line.startswith("looks wrong: "))
    for part in ("set OMP_NUM_THREADS=1", "ulimit -n is 256", "/dev/shm has 0.50 GiB"):
        assert part in lines


def test_what_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert main(["doctor"]) == 1
    assert "broken: " in capsys.readouterr().out


def test_a_driver_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = tmp_path / "nvidia-smi"
    stub.write_text("#!/bin/sh\nexec sleep 1000\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    assert main(["doctor"]) == 1
    assert "broken: nvidia-smi has not answered" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert main(["doctor"]) == 0  # one process asks
