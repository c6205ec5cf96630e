"""The code of the documentation's pages does what it says, or at least runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ranks import run_ranks

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [path for path in sorted(DOCS.glob("*.md")) if "```python" in path.read_text()]


def run(rank, blocks):
    """Every block in turn, in one namespace, as in a script that torchrun started."""
    names = {}
    for block in blocks:
        exec(compile(block, block.splitlines()[0], "exec"), names)
    return len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_python_runs(page):
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python")
    assert run_ranks(2, run, blocks) == [len(blocks)] * 2
