"""Processes that do not find each other end."""

from __future__ import annotations

import multiprocessing
import os
import time
from unittest.mock import patch

from bigbatch.config.models import Parallel
from bigbatch.dist import Runtime, runtime


def wait_for_the_dead(stderr):
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(WORLD_SIZE="2", RANK="1")
    with patch.object(runtime, "_accelerator", lambda parallel: time.sleep(60)):
        Runtime(parallel=Parallel(timeout=0.2))


def test_a_process_whose_peer_died_while_they_met_says_so_and_ends(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=wait_for_the_dead, args=(tmp_path / "stderr",))
    process.start()
    process.join(30)
    assert process.exitcode == 1
    said = (tmp_path / "stderr").read_text()
    assert "rank 1: 2 processes have not found each other in twice parallel.timeout = 0.2 s" in said
