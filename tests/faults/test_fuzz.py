"""Whatever a recipe says: it plans and trains, or there is one message and exit code 2, and nothing is left behind."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigbatch.cli import main

RECIPE: dict[str, Any] = {
    "seed": 1,
    "run": {"dir": "run", "stop_after": "1st", "nonfinite_limit": 3},
    "duration": "2ep",
    "batch": {"global": 32, "micro": 16},
    "optim": {
        "name": "lars",
        "lr": 0.1,
        "weight_decay": 1e-4,
        "groups": [{"match": "bias_and_norm", "weight_decay": 0.0, "adapt": False}, {"match": "rest"}],
    },
    "scaling": {"rule": "linear", "base_batch": 32},
    "warmup": {"kind": "gradual", "duration": "10%", "start": "zero"},
    "decay": {"kind": "multistep", "at": ["50%", "75%"], "factor": 0.1},
    "clip": {"kind": "norm", "max": 1.0},
    "norm": {"kind": "batch", "span": 8},
    "task": {"name": "classification", "model": "bigbatch/resnet_small", "options": {"widths": [4], "blocks": 1}},
    "data": {
        "name": "synthetic",
        "size": 64,
        "shape": [1, 8, 8],
        "evaluation": 8,
        "augment": {"shift": 1, "mixup": 0.2},
    },
    "eval": {"every": "1ep"},
    "checkpoint": {"every": "1ep", "keep": 1, "best": "accuracy"},
    "tracking": {"every": "1st", "console": "none", "wandb": {"mode": "disabled", "tags": ["a"]}},
    "parallel": {"strategy": "ddp", "timeout": 60, "check_every": None},
    "precision": "fp32",
    "debug": False,
}
LARGE = ("batch", "data", "duration", "options")
"""Where a number can ask for more time and memory than there is, which training then takes."""

Path_ = tuple[str | int, ...]

words = st.sampled_from(
    ["", " ", "x" * 5000, "\0", "\ud800", "\u2028\n", "ünï", "${HOME}", "~nobody/x", "a/" * 3000, "../.."]
)
numbers = st.sampled_from([0, -1, 2**31, 2**63, 10**30, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")])
others = st.sampled_from(
    [None, True, False, "off", "null", "1e400ep", "0ep", "1e99ep", "1e-99ep", "100%", "3st", "inf", "1_0"]
)
junk = st.recursive(
    words | numbers | others | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(
    ["", "name", "kind", "extends", "<<", "global_", "x" * 5000, "\n", 7, None, 1.5, True, "__class__"]
)


def places(tree: Any, above: Path_ = ()) -> Iterator[Path_]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield (*above, key)
        yield from places(value, (*above, key))


PLACES = sorted([*places(RECIPE), ("data", "path"), ("data", "path", 0), ("data", "validation")], key=str)


@st.composite
def recipes(draw: st.DrawFn, *, places: list[Path_] = PLACES, most: int = 3) -> dict[Any, Any]:
    """A whole recipe with some of its keys changed, taken away, misspelt or joined by others."""
    tree: dict[Any, Any] = copy.deepcopy(RECIPE)
    if "path" in {place[-1] for place in places} and draw(st.booleans()):
        tree["data"] = {"name": "idx", "size": 64, "path": ["a", "b"], "validation": 8}
    for place in draw(st.lists(st.sampled_from(places), min_size=1, max_size=most)):
        *above, key = place
        node: Any = tree
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
            for part in above:
                node = node[part]
            match draw(st.sampled_from(["change", "change", "change", "remove", "misspell", "add"])):
                case "change":
                    node[key] = draw(junk)
                case "remove":
                    del node[key]
                case "misspell":
                    node[f"{key}s"] = node.pop(key)
                case "add":
                    node[draw(keys)] = draw(junk)
    return tree


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of the command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as left:  # argparse
            code = int(left.code or 0)
    return code, err.getvalue()


def check(code: int, said: str) -> None:
    assert code in (0, 2), said
    if code == 2:
        assert said.startswith(("bigbatch: ", "usage: "))
        assert said.startswith("usage: ") or said.count("\n") == 1, said
        assert len(said) < 700, said
        said.encode()  # a terminal takes it


fuzzed = settings(max_examples=200, derandomize=True, suppress_health_check=list(HealthCheck))


@fuzzed
@given(tree=recipes())
def test_a_plan_or_one_message(tree: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    check(*run("plan", str(recipe)))


SMALL = [place for place in PLACES if not set(place) & set(LARGE)]


@settings(fuzzed, max_examples=40)
@given(tree=recipes(places=SMALL, most=2))
def test_a_run_or_one_message(tree: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    work = tmp_path_factory.mktemp("train")
    (work / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    code, said = run("train", str(work / "recipe.yaml"), f"run.dir={work / 'run'}")
    if code != 1 or "gradient was not finite" not in said:
        check(code, said)
    assert (work / "run").exists() is (code != 2)


# --------------------------------------------------------------------------------------------- what is not YAML

BASE = yaml.safe_dump(RECIPE)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"k{i + 1}: &k{i + 1} {{<<: [*{p}, *{p}]}}\n" for i, p in enumerate(["a", *(f"k{i}" for i in range(1, 40))])
)
TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "only a comment": "# nothing\n",
    "tabs": "batch:\n\tglobal: 3\n",
    "a list": "- 1\n- 2\n",
    "two documents": f"{BASE}\n---\n{BASE}",
    "unknown alias": "seed: *nobody\n",
    "alias of itself": "seed: &a [*a]\n",
    "mapping in itself": "&a\nrun: *a\n",
    "billion laughs": BOMB,
    "laughs in the options": f"{BASE}\n{BOMB}",
    "billion merges": MERGES,
    "merge of no mapping": "run: {<<: [1, 2]}\n",
    "twice": "seed: 1\nseed: 2\n",
    "twice below": "batch: {global: 1, global: 2}\n",
    "deep": f"seed: {'[' * 2000}{']' * 2000}\n",
    "deep, unclosed": "{" * 2000,
    "long": f"seed: {'9' * 10_000}\n",
    "long word": f"seed: {'x' * 1_000_000}\n",
    "null byte": "seed: 1\0\n",
    "half a character": 'run: {dir: "\\ud800"}\n',
    "binary": bytes(range(256)) * 10,
    "not UTF-8": "seed: ü\n".encode("latin-1"),
    "UTF-16": BASE.encode("utf-16"),
    "unclosed": "batch: {global: 3\n",
    "no key": "[a, b]: 3\n? {c: d}\n: 4\n",
    "equals": "seed: =\n",
    "!!python/object/apply": "seed: !!python/object/apply:os.mkdir [executed]\n",
    "!!python/object/new": "seed: !!python/object/new:os.mkdir [executed]\n",
    "!!python/name": "seed: !!python/name:os.system\n",
    "!!python/module": "seed: !!python/module:antigravity\n",
    "!!python/tuple": "batch: {global: !!python/tuple [1, 2]}\n",
    "!!binary": "run: {dir: !!binary aGVsbG8=}\n",
    "!!set": "batch: !!set {global}\n",
    "!!timestamp": "run: {dir: !!timestamp 2001-01-01}\n",
    "!!int of many digits": f"seed: !!int 0x{'f' * 10_000}\n",
    "own tag": "seed: !mine 3\n",
    "extends itself": "extends: recipe.yaml\n",
    "extends a folder": "extends: .\n",
    "extends nobody": "extends: nowhere.yaml\n",
    "extends an impossible name": 'extends: "a\\0b"\n',
    "extends a long name": f"extends: {'x' * 5000}\n",
    "extends a list": "extends: [a, b]\n",
    "extends a link to itself": "extends: link.yaml\n",
    "extends a circle": "extends: other.yaml\n",
    "extends what is no recipe": "extends: /etc/passwd\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = TEXTS[name]
    Path("recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    Path("other.yaml").write_text("extends: recipe.yaml\n")
    Path("link.yaml").symlink_to("link.yaml")
    before = sorted(tmp_path.iterdir())
    for verb in ("plan", "train"):
        code, said = run(verb, "recipe.yaml")
        check(code, said)
        assert code == 2
        assert "recipe.yaml" in said or "link.yaml" in said or "extends" in name
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    code, said = run("plan", str(tmp_path))
    check(code, said)
    assert code == 2


OVERRIDES = [
    "=",
    "=3",
    ".=3",
    "seed",
    "seed==",
    "seed={",
    "seed=[1",
    "seed=*a",
    "seed=&a [*a]",
    "seed=!!python/object/apply:os.mkdir [executed]",
    "seed=\0",
    "seed=\udc80",
    "seed.a.b=1",
    f"{'a.' * 3000}a=1",
    f"{'x' * 5000}=1",
    f"seed={'9' * 5000}",
    f"seed={'[' * 2000}",
    f"task.options={{a: {BOMB.splitlines()[0][3:]}}}",
    "run={}",
    "run=3",
    "optim=null",
    "optim.groups.0.match=(",
    "extends=x.yaml",
    "batch.global=1e999",
    "data.name=",
    "duration=",
    "--",
    "-x=3",
]


@pytest.mark.parametrize("override", OVERRIDES, ids=[text[:20] for text in OVERRIDES])
def test_broken_overrides(override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(BASE)
    code, said = run("plan", "recipe.yaml", override)
    check(code, said)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
