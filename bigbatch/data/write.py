"""Class folders become shuffled tar shards with an index.

A shard has its name only once it is whole, and is a function of the images and the settings alone. So what was killed
goes on after the shards that are there, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.signals import end_with_owner

from .cache import Rows, locked, whole
from .index import FORMAT, INDEX, ROWS, UNFINISHED, scan
from .listing import Listing, listed

SPLITS, LOCK = ("train", "val", "test"), ".lock"
PROBE = 64
"""Images that tell how large the others are, and whether the source is still the same."""


@dataclass(frozen=True)
class Job:
    """A shard to write: files and their labels, numbered from ``first`` on."""

    path: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    first: int
    resize: int | None


def write_shards(
    source: Path,
    dest: Path,
    *,
    size: int,
    seed: int,
    splits: Sequence[str] | None = None,
    resize: int | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the class folders of ``source``/split for each of ``splits``, or go on in a begun ``dest``; the index.

    A shard has as many images as come to ``size`` bytes on average, a split's last one the rest; their order follows
    from ``seed``. With ``resize``, a larger JPEG is made smaller, its shorter side to so many pixels. ``progress`` is
    told of images written now, and of all. Raises ValueError for a source or a ``dest`` that will not do, OSError for
    files that cannot be read or written, BrokenProcessPool where a process dies.
    """
    settings, jobs = _plan(source, dest, size=size, seed=seed, splits=splits, resize=resize)
    with locked(dest / LOCK):  # another that writes here is waited for
        if not _begun(dest, settings):
            total = sum(len(job.files) for job in jobs)
            written = _write_all(jobs, workers=workers, done=lambda count: progress(count, total))
            _finish(dest, settings, jobs, written)
    index: dict[str, Any] = json.loads((dest / INDEX).read_text(encoding="utf-8"))
    return index


def _plan(
    source: Path, dest: Path, *, size: int, seed: int, splits: Sequence[str] | None, resize: int | None
) -> tuple[dict[str, Any], list[Job]]:
    """What makes the result what it is, and the shards."""
    from .sampler import order

    splits = splits or [split for split in SPLITS if (source / split).is_dir()]
    if not splits:
        raise ValueError(f"{source}: has no folder {', '.join(SPLITS)}; name those that it has with --splits")
    found = {split: listed(str(source), split, "--splits") for split in splits}
    classes = found[splits[0]].classes
    if other := sorted({name for listing in found.values() for name in listing.classes} - set(classes)):
        raise ValueError(f"{source}: {splits[0]} has no class {other[0]!r}, and another split has; rename or remove")
    if not classes or not all(found[splits[0]].files):
        raise ValueError(f"{source}: {splits[0]} has a class folder without images, or none at all; each needs some")
    shuffled = {}
    for number, (split, listing) in enumerate(found.items()):
        files = list(_labelled(listing, classes))
        shuffled[split] = [files[i] for i in order(len(files), seed=seed, epoch=number).tolist()]
    probe = [_image(file, resize) for file, _ in shuffled[splits[0]][:PROBE]]
    # Of a sample, two headers, the label and half a block of padding come to its image.
    each = sum(map(len, probe)) // len(probe) + 7 * tarfile.BLOCKSIZE // 2
    names = [os.path.relpath(file, source) for files in shuffled.values() for file, _ in files]
    settings = {
        "seed": seed,
        "size": size,
        "resize": resize,
        "splits": {split: len(files) for split, files in shuffled.items()},
        "classes": list(classes),
        "source": hashlib.sha256(b"\0".join([*map(os.fsencode, names), *probe])).hexdigest(),
    }
    return settings, list(_jobs(shuffled, dest, count=max(1, size // each), resize=resize))


def _labelled(listing: Listing, classes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    for name, files in zip(listing.classes, listing.files, strict=True):
        label, folder = classes.index(name), os.path.join(listing.root, name)
        yield from ((os.path.join(folder, file), label) for file in files)


def _jobs(shuffled: dict[str, list[tuple[str, int]]], dest: Path, *, count: int, resize: int | None) -> Iterator[Job]:
    first = 0
    for split, samples in shuffled.items():
        for number, low in enumerate(range(0, len(samples), count)):
            files, labels = zip(*samples[low : low + count], strict=True)
            yield Job(dest / f"{split}-{number:06d}.tar", files, labels, first, resize)
            first += len(files)


def _begun(dest: Path, settings: dict[str, Any]) -> bool:
    """Whether all is done; begin otherwise. ValueError for a folder that has something else in it."""
    for path in (dest / UNFINISHED, dest / INDEX):
        if path.exists():
            there = json.loads(path.read_bytes())
            for key in settings:
                if there.get(key) != settings[key]:
                    raise ValueError(f"{dest}: was begun with another {key}; repeat that command, or give a new folder")
            return path.name == INDEX
    if set(os.listdir(dest)) - {LOCK}:
        raise ValueError(f"{dest}: has other files in it; give a new folder")
    _save(dest / UNFINISHED, settings)
    return False


def _save(path: Path, content: dict[str, Any]) -> None:
    with whole(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def _write_all(jobs: list[Job], *, workers: int, done: Callable[[int], None]) -> list[tuple[str, Rows]]:
    """SHA-256 and samples of each shard, by the order of jobs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=end_with_owner)
    try:
        futures = {pool.submit(_write, job): len(job.files) for job in jobs}
        for future in as_completed(futures):
            future.result()
            done(futures[future])
    finally:
        pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _write(job: Job) -> tuple[str, Rows]:
    """Write a shard unless it is there, and read it once more: SHA-256 and samples."""
    if not job.path.exists():
        with whole(job.path) as out, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (path, label) in enumerate(zip(job.files, job.labels, strict=True), start=job.first):
                _add(tar, f"{number:08d}{os.path.splitext(path)[1].lower()}", _image(path, job.resize))
                _add(tar, f"{number:08d}.cls", b"%d" % label)
    digest = hashlib.sha256()
    with job.path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
        file.seek(0)
        rows = scan(file, str(job.path))
    if rows["label"].tolist() != list(job.labels):
        raise ValueError(f"{job.path}: is not the shard that was written; delete it, and run the command again")
    return digest.hexdigest(), rows


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


def _image(path: str, resize: int | None) -> bytes:
    """The file, byte for byte; or a JPEG made smaller, its orientation kept."""
    data = Path(path).read_bytes()
    if resize is None:
        return data
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=("JPEG",)) as image:
            width, height = (max(resize, round(side * resize / min(image.size))) for side in image.size)
            if (width, height) == image.size or min(image.size) < resize or image.mode not in ("L", "RGB"):
                return data
            image.draft(None, (2 * width, 2 * height))
            out = BytesIO()
            smaller = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
            smaller.save(out, "JPEG", quality=95, exif=image.info.get("exif", b""))
            return out.getvalue()
    except Exception:  # no JPEG, or a broken one: a run that reads it says what is wrong
        return data


def _finish(dest: Path, settings: dict[str, Any], jobs: list[Job], written: list[tuple[str, Rows]]) -> None:
    """Write the index, by which loaders know that the shards are whole and all there."""
    shards = [
        {"name": job.path.name, "samples": len(job.files), "bytes": job.path.stat().st_size, "sha256": digest}
        for job, (digest, _) in zip(jobs, written, strict=True)
    ]
    with whole(dest / ROWS) as file:
        np.save(file, np.concatenate([rows for _, rows in written]), allow_pickle=False)
    _save(dest / INDEX, {"format": FORMAT, **settings, "shards": shards})
    (dest / UNFINISHED).unlink(missing_ok=True)
