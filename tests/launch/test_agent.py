"""The agent alone, with workers that do next to nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from bigbatch.cli.watchdog import ALONE
from runs.command import ROOT, environment

SETTINGS = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 1, "run_id": "test"}
HERE = {"host": "127.0.0.1", "port": 0, "listen": "127.0.0.1", "local_addr": "127.0.0.1"}


def agent(*command: str, **settings: object) -> list[str]:
    settings = SETTINGS | HERE | {"parent": os.getpid(), "rdzv_configs": {"is_host": False}} | settings
    return [sys.executable, "-m", "bigbatch.cli.agent", json.dumps(settings), *command]


def code(*command: str, **settings: object) -> int:
    return subprocess.run(agent(*command, **settings), cwd=ROOT, env=environment(), timeout=120).returncode


def test_its_exit_code_is_a_bad_recipes() -> None:
    assert code("-c", "raise SystemExit(2)") == 2


def test_it_starts_nothing_where_its_launcher_has_ended_already(tmp_path: Path) -> None:
    assert code("-c", f"open({str(tmp_path / 'up')!r}, 'w')", parent=-1) == 1
    assert not (tmp_path / "up").exists()


def test_nobody_at_the_head() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    limits = {"is_host": False, "read_timeout": 1}
    assert code("-c", "pass", host="127.0.0.1", port=port, listen=None, rdzv_configs=limits) == ALONE


def test_it_listens_on_one_address_and_ends_with_its_launcher(tmp_path: Path) -> None:
    worker = f"import time, pathlib; pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(1000)"
    # So that the worker's store, which is torch's own and listens everywhere, is not the agent's.
    environ = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    mine = "[word.replace('ME', str(os.getpid())) for word in sys.argv[1:]]"
    launcher = [sys.executable, "-c", f"import os, subprocess, sys; subprocess.run({mine})"]
    command = [word.replace(f'"parent": {os.getpid()}', '"parent": ME') for word in agent("-c", worker)]
    process = subprocess.Popen([*launcher, *command], cwd=ROOT, env=environ)
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2
    listening = [c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]
    process.kill()
    process.wait()
    assert psutil.wait_procs(family, timeout=60)[1] == []
