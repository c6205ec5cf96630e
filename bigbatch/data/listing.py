"""Which files and samples a dataset has, found without torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from bigbatch.config.models import Folder, Hub, Shards

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
"""Of files that are taken for images, in any case; what is in them decides how they are decoded."""


@dataclass(frozen=True)
class Listing:
    """Images in class folders: ``files[k]`` are paths below ``root/classes[k]``, in order. Images and class folders
    may be links, folders below them not."""

    root: str
    classes: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return sum(map(len, self.files))


def files_size(config: Folder | Shards | Hub) -> int:
    """Training samples. Raises ValueError where the files are not what they should be; without any, ``data.size``
    counts."""
    match config:
        case Folder():
            if config.size is not None and not os.path.isdir(os.path.expanduser(config.path)):
                return config.size
            return len(list_train(config)[0])
        case Shards() | Hub():
            from .hub import hub_size
            from .index import held_out, shards_size

            fetch = config.size is None
            try:
                size = shards_size(config, fetch=fetch) if isinstance(config, Shards) else hub_size(config, fetch=fetch)
            except ValueError:
                if config.size is None:
                    raise
                return config.size
            share = config.validation
            return size - int(held_out(size, share).sum()) if isinstance(share, float) else size


def list_train(config: Folder) -> tuple[Listing, Listing]:
    """Training images, and those of ``data.validation``, which is another folder or a share of the training folder.

    An image validates if the hash of its class and name is below the share: a new image moves no other.
    Raises ValueError for a class without training images, fewer than two classes, and no validation images.
    """
    whole = train = listed(config.path, config.train, "data.train")
    if len(whole.classes) < 2:
        found = f"the class folder {whole.classes[0]} alone" if whole.classes else "no class folders"
        raise ValueError(f"data.train = {config.train!r}: {whole.root} has {found}; give it a folder for each class")
    if isinstance(config.validation, str):
        validation = list_other(config, config.validation, key="data.validation", classes=whole.classes)
    else:
        train, validation = (_share(whole, config.validation, held=held) for held in (False, True))
    empty = [name for name, files in zip(train.classes, train.files, strict=True) if not files]
    if empty:
        taken = "" if isinstance(config.validation, str) else f" that data.validation = {config.validation} leaves"
        raise ValueError(
            f"data.train = {config.train!r}: {_few(empty)} in {train.root}: no images{taken} "
            f"({', '.join(EXTENSIONS)}); add some or remove the folder"
        )
    if not len(validation):
        raise ValueError(f"data.validation = {config.validation!r}: {validation.root} has no images to validate on")
    return train, validation


def list_other(config: Folder, name: str, *, key: str, classes: tuple[str, ...]) -> Listing:
    """Images to evaluate on, by the classes of training; ValueError where they are of others."""
    found = listed(config.path, name, key)
    other = sorted(set(found.classes) - set(classes))
    if other:
        raise ValueError(
            f"{key} = {name!r}: {_few(other)} in {found.root}: not among the {len(classes)} classes of training; "
            "rename or remove"
        )
    by_class = dict(zip(found.classes, found.files, strict=True))
    return Listing(found.root, classes, tuple(by_class.get(name, ()) for name in classes))


@lru_cache(maxsize=4)  # the plan counts them, and the run lists them
def listed(path: str, name: str, key: str) -> Listing:
    """All images of a part, ``name`` in ``path``; ``key`` is for messages. Raises ValueError."""
    root = os.path.join(os.path.expanduser(path), name)
    if not os.path.isdir(root):
        raise ValueError(
            f"{key} = {name!r}: {root} is no folder; give data.path one that has it"
            + (", or data.size=N to plan without the images" if key == "data.train" else "")
        )
    entries = sorted(_visible(root), key=lambda entry: entry.name)
    strays = [entry.name for entry in entries if _is_image(entry.name) and os.path.isfile(entry.path)]
    if strays:
        raise ValueError(
            f"{key} = {name!r}: {_few(strays)} in {root}: no class folder; move images into one folder for each class"
        )
    classes = tuple(entry.name for entry in entries if os.path.isdir(entry.path))
    return Listing(root, classes, tuple(tuple(sorted(_images(os.path.join(root, name)))) for name in classes))


def _images(folder: str, below: str = "") -> Iterator[str]:
    for entry in _visible(os.path.join(folder, below)):
        path = os.path.join(below, entry.name)
        if _is_image(entry.name):
            yield path
        elif entry.is_dir(follow_symlinks=False):  # a link may lead back to where it stands
            yield from _images(folder, path)


def _visible(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"data.path: {folder} cannot be listed ({error.strerror})") from None


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _share(whole: Listing, share: float, *, held: bool) -> Listing:
    def validates(name: str, file: str) -> bool:
        digest = hashlib.blake2b(os.fsencode(f"{name}/{file}"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * 2**64

    files = (
        tuple(file for file in files if validates(name, file) is held)
        for name, files in zip(whole.classes, whole.files, strict=True)
    )
    return Listing(whole.root, whole.classes, tuple(files))


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
