"""Who may import whom: only towards the right, and the rooms of one floor not at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bigbatch"

FLOORS = (
    {"__main__"},
    {"cli"},
    {"analysis"},
    {"train"},
    {"measure"},
    {"optim", "clip", "dropout", "norm", "dist", "data", "tasks", "tracking"},
    {"custom", "keyed", "signals", "spec"},
    {"plan"},
    {"schedules"},
    {"config"},
)
HEIGHT = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_TORCH = {"plan", "schedules", "config"}
ASSEMBLED = {"optim", "norm", "data", "tasks"}
MOST_LINES_OF_A_FILE, MOST_LINES_OF_CODE = 400, 10700

FILES = sorted(PACKAGE.rglob("*.py"))


def imports(source: str, *, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, wherever in the file; ``from a import b`` gives ``a.b``."""
    here = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rooms_in(path: Path) -> set[str]:
    source = path.read_text(encoding="utf-8")
    names = [name for _, name in imports(source, module=module_of(path), is_package=path.stem == "__init__")]
    return {name.split(".")[1] for name in names if name.startswith("bigbatch.")}


def violations(source: str, *, module: str, is_package: bool) -> list[str]:
    """What a module imports and must not. The package's own front door is free: it only loads what it is asked for."""
    if module == "bigbatch":
        return []
    room = module.split(".")[1]
    if room not in HEIGHT:
        return [f"{module}: {room} has no floor yet; give it one in {Path(__file__).name}"]
    found = []
    for line, name in imports(source, module=module, is_package=is_package):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "torch" and room in WITHOUT_TORCH:
            found.append(f"{module}:{line} imports {name}; {room} must do without torch")
        if top != "bigbatch" or target in (room, "__version__"):
            continue
        if target not in HEIGHT:
            found.append(f"{module}:{line} imports {name}; import from the room that defines it")
        elif HEIGHT[target] <= HEIGHT[room]:
            found.append(f"{module}:{line} imports {name}; {room} may not know {target}")
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_right(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert violations(source, module=module_of(path), is_package=path.stem == "__init__") == []


def test_only_assemble_knows_everybody() -> None:
    knowing = {module_of(path) for path in FILES if path.parent != PACKAGE and rooms_in(path) >= ASSEMBLED}
    assert knowing <= {"bigbatch.train.assemble"}


@pytest.mark.parametrize(
    ("module", "source", "legal"),
    [
        ("bigbatch.optim.lars", "from bigbatch.config import RunConfig", True),
        ("bigbatch.optim.lars", "from .trust import ratio\nfrom . import groups", True),
        ("bigbatch.optim.lars", "from bigbatch.norm import convert_norm", False),
        ("bigbatch.optim.lars", "from ..clip import clip_gradients", False),
        ("bigbatch.optim.lars", "def f():\n    import bigbatch.dist.runtime", False),
        ("bigbatch.optim.lars", "from bigbatch import LARS", False),
        ("bigbatch.measure.noise", "from .. import optim", True),
        ("bigbatch.optim.lars", "from .. import measure", False),
        ("bigbatch.cli", "from bigbatch import __version__, train", True),
        ("bigbatch.train.loop", "from bigbatch.cli import main", False),
        ("bigbatch.plan.resolve", "import torch.nn", False),
        ("bigbatch.plan.resolve", "from bigbatch.data import size_of", False),
        ("bigbatch.schedules.curves", "from bigbatch.plan import Plan", False),
        ("bigbatch.attic.old", "import math", False),
    ],
)
def test_the_check_sees(module: str, source: str, legal: bool) -> None:
    assert (violations(source, module=module, is_package=False) == []) is legal


def test_the_plan_needs_no_torch() -> None:
    rooms = "bigbatch, bigbatch.config, bigbatch.plan, bigbatch.schedules"
    code = f"import sys, {rooms}; print(*{{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_the_package_can_be_read_in_an_afternoon() -> None:
    sources = {module_of(path): path.read_text(encoding="utf-8") for path in FILES}
    lines = {module: len(source.splitlines()) for module, source in sources.items()}
    assert {module: count for module, count in lines.items() if count >= MOST_LINES_OF_A_FILE} == {}
    assert sum(map(lines_of_code, sources.values())) < MOST_LINES_OF_CODE


def lines_of_code(source: str) -> int:
    """Lines that are neither blank nor comment nor docstring; those explain, and there may be as many as help."""
    told: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            told.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate((line.strip() for line in source.splitlines()), 1)
    return sum(1 for number, line in lines if line and line[0] != "#" and number not in told)
