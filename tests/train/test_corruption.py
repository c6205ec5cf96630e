"""A thousand ways to damage checkpoints: none is loaded silently, and nothing that is whole is turned away."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bigbatch.train import RunError
from bigbatch.train.checkpoint import Checkpoints
from bigbatch.train.saved import FILES, MANIFEST

STEPS = (9, 10, 20)
CORRUPTIONS = 1000
Damage = Callable[[random.Random, Path], None]


def contents(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(3, 5, generator=generator), "b": torch.zeros(4)}
    moments = {0: {"step": torch.tensor(float(step)), "momentum": torch.randn(3, 5, generator=generator)}}
    optimizer = {"state": moments, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}]}
    preprocess = {"scale": torch.randn(1, 8, 8, dtype=torch.float64, generator=generator)}
    state = {"samples": 96 * step, "metrics": {"accuracy": 0.5}}
    return {"model": weights, "optimizer": optimizer, "state": state, "preprocess": preprocess}


def checkpoints(root: Path) -> Checkpoints:
    return Checkpoints(root, keep=len(STEPS), best="accuracy", best_is="max")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    for step in STEPS:
        checkpoints(root).save(step, **contents(step))
    return root


def seen(path: Path) -> Any:
    """All that a directory entry is."""
    if path.is_symlink():
        return "link", os.readlink(path)
    return {entry.name: seen(entry) for entry in path.iterdir()} if path.is_dir() else path.read_bytes()


def put(path: Path, content: bytes) -> None:
    path.unlink()  # the original lies behind the same inode
    path.write_bytes(content)


def a_file(draw: random.Random, root: Path) -> Path:
    return draw.choice(sorted(root.iterdir())) / draw.choice(FILES)


def flip(draw: random.Random, root: Path) -> None:
    path = a_file(draw, root)
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 5))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    put(path, bytes(content))


def truncate(draw: random.Random, root: Path) -> None:
    path = a_file(draw, root)
    content = path.read_bytes()
    put(path, content[: draw.randrange(len(content))])


def empty(draw: random.Random, root: Path) -> None:
    put(a_file(draw, root), b"")


def zero(draw: random.Random, root: Path) -> None:
    path = a_file(draw, root)
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice((1, 16, 512, 4096)))
    content[start:stop] = bytes(stop - start)
    put(path, bytes(content))


def append(draw: random.Random, root: Path) -> None:
    path = a_file(draw, root)
    put(path, path.read_bytes() + draw.choice((b"\0", b"\n", b" ", draw.randbytes(100))))


def delete(draw: random.Random, root: Path) -> None:
    a_file(draw, root).unlink()


def swap(draw: random.Random, root: Path) -> None:
    """Some files of two checkpoints, the manifest too."""
    one, two = draw.sample(sorted(root.iterdir()), 2)
    for name in draw.sample(FILES, draw.randint(1, len(FILES))):
        ours, theirs = (one / name).read_bytes(), (two / name).read_bytes()
        put(one / name, theirs)
        put(two / name, ours)


def rename(draw: random.Random, root: Path) -> None:
    path = draw.choice(sorted(root.iterdir()))
    other = draw.choice(("00000015", "00000099", "99999999", "20", "00000021", "latest", ".00000030.part"))
    path.rename(root / other)


def change_places(draw: random.Random, root: Path) -> None:
    one, two = draw.sample(sorted(root.iterdir()), 2)
    aside = root / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def half_written(draw: random.Random, root: Path) -> None:
    path = draw.choice(sorted(root.iterdir()))
    part = root / draw.choice((f".{path.name}.part", ".00000030.part", "00000030"))
    part.mkdir()
    for name in draw.sample(FILES, draw.randint(0, len(FILES))):
        content = (path / name).read_bytes()
        (part / name).write_bytes(content[: draw.randint(0, len(content))])


def other_kind(draw: random.Random, root: Path) -> None:
    """A directory, or a link, even one to a good file, where a file should be."""
    path = a_file(draw, root)
    kind = draw.choice(("directory", "copy", "other", "nothing"))
    good = path.rename(root.parent / "good")
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"copy": good, "other": a_file(draw, root), "nothing": root / "nothing"}[kind])


def no_directory(draw: random.Random, root: Path) -> None:
    path = draw.choice(sorted(root.iterdir()))
    path.rename(root.parent / "good")
    kind = draw.choice(("file", "link", "nothing"))
    if kind == "file":
        path.write_bytes(b"")
    else:
        path.symlink_to(draw.choice(sorted(root.iterdir())) if kind == "link" else root / "nothing")


def stranger(draw: random.Random, root: Path) -> None:
    path = draw.choice(sorted(root.iterdir())) / draw.choice(("model.bin", ".hidden", "state.json~"))
    path.write_bytes(b"") if draw.random() < 0.5 else path.mkdir()


def same_meaning(draw: random.Random, root: Path) -> None:
    """A manifest that says the same in other bytes."""
    path = draw.choice(sorted(root.iterdir())) / MANIFEST
    text = path.read_text()
    first, *middle, last = text.splitlines()
    swapped = "\n".join([first, *(line.rstrip(",") + "," for line in reversed(middle)), last]).replace(",\n}", "\n}")
    put(path, draw.choice((text.upper().lower() + " ", text.replace("  ", " "), text.upper(), swapped)).encode())


KINDS: tuple[Damage, ...] = (
    flip, flip, flip, truncate, empty, zero, append, delete, swap, rename, change_places, half_written, other_kind,
    no_directory, stranger, same_meaning,
)  # fmt: skip


def test_none_of_a_thousand_corruptions_is_loaded_silently(whole: Path, tmp_path: Path) -> None:
    original = {path.name: seen(path) for path in whole.iterdir()}
    loaded, refused = dict.fromkeys(original, 0), 0
    for seed in range(CORRUPTIONS):
        draw, place = random.Random(seed), tmp_path / str(seed)
        root = shutil.copytree(whole, place / "checkpoints", copy_function=os.link)
        for damage in draw.choices(KINDS, k=draw.choice((1, 1, 1, 6))):
            try:
                damage(draw, root)
            except (OSError, ValueError):
                continue  # another one has already taken away what this one would damage
        now = {path.name: seen(path) for path in root.iterdir()}
        names = sorted((name for name in now if len(name) == 8 and name.isdecimal()), reverse=True)
        try:
            found, complaints = checkpoints(root).newest()
        except RunError as error:
            refused += 1
            assert names and all(now[name] != original.get(name) for name in names), f"seed {seed}: {error}"
            assert all(name in str(error) for name in names)
            continue
        finally:
            shutil.rmtree(place)
        assert found is not None, f"seed {seed}: taken for a run without checkpoints"
        newer = names[: names.index(found.path.name)]
        assert now[found.path.name] == original[found.path.name], f"seed {seed}: loaded damaged"
        assert all(now[name] != original.get(name) for name in newer), f"seed {seed}: turned away whole: {complaints}"
        assert len(complaints) == len(newer) and all(map(str.__contains__, complaints, newer))
        loaded[found.path.name] += 1
    # Every outcome was met: no damage to the newest, one or two steps back, none left.
    assert min(*loaded.values(), refused) > 10, (loaded, refused)
