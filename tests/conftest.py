"""What every test runs under: no network, one thread a process, and no GPU test where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_ERROR_REPORTING="false",
    TOKENIZERS_PARALLELISM="false",
)
# Set before torch is imported, here and in child processes: the tensors of the tests are too small to share out.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton is: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes is the machine's business, not the code's.
hypothesis.settings.register_profile("bigbatch", deadline=None)
hypothesis.settings.load_profile("bigbatch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))
