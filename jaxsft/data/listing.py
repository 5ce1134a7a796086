"""What lies in folders: of a disk asked when it is wanted, of a bucket listed once, by one process of a run for all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from jaxsft import buckets, storage
from jaxsft.buckets import BucketPath
from jaxsft.cli import UserError
from jaxsft.data import hosts
from jaxsft.storage import Location

Stamp = tuple[int, int]  # (bytes, time of the last change in ns) of a file


class Tree(NamedTuple):
    """All that a bucket has below a folder, by address."""

    folders: dict[str, tuple[list[str], list[str]]]  # the names of the folders and of the files in each, sorted
    files: dict[str, Stamp]


TREES: dict[str, Tree] = {}  # by the address of the folder; for as long as a run opens its data


def read(root: Location) -> None:
    """List a folder of a bucket, of which `scan` and `stamp` then know. One of this machine is looked at then.

    Raises:
      UserError: it can't be listed.
    """
    if isinstance(root, BucketPath) and not any(contains(known, str(root)) for known in TREES):
        TREES[str(root)] = tree(str(root), hosts.once(lambda: found_in(root)))


def forget() -> None:
    """From now on list anew: what a bucket holds may have changed."""
    TREES.clear()


def found_in(root: BucketPath) -> list[tuple[str, int, int]]:
    """(name from `root` on, bytes, time of the last change) of all files. Raises UserError."""
    try:
        return [(name, entry.size, entry.changed_ns) for name, entry in root.walk().items()]
    except OSError as error:
        raise UserError(f"{root} can't be read: {error.strerror}", "name a bucket that can be") from None


def tree(root: str, found: list[tuple[str, int, int]]) -> Tree:
    """The folders that the names of objects make."""
    below: dict[str, tuple[set[str], set[str]]] = {root: (set(), set())}
    files = {}
    for name, size, changed in found:
        *above, last = name.split("/")
        folder = root
        for part in above:
            below[folder][0].add(part)
            folder = f"{folder}/{part}"
            below.setdefault(folder, (set(), set()))
        below[folder][1].add(last)
        files[f"{folder}/{last}"] = (size, changed)
    return Tree({folder: (sorted(f), sorted(n)) for folder, (f, n) in below.items()}, files)


def contains(root: str, path: str) -> bool:
    """Whether an address is `root` or below it."""
    return path == root or path.startswith(f"{root}/")


def known(path: str) -> Tree | None:
    """The listing that has `path`, where one has been read."""
    return next((found for root, found in TREES.items() if contains(root, path)), None)


def is_folder(path: Location) -> bool:
    """Whether there is such a folder; in a bucket, one with something in it."""
    if isinstance(path, BucketPath):
        found = known(str(path))
        return found is not None and any(found.folders.get(str(path), ()))
    return os.path.isdir(path)


def is_file(path: str) -> bool:
    """Whether there is such a file."""
    return stamp(path)[0] >= 0 if storage.is_remote(path) else os.path.isfile(path)


def scan(path: Path | str | BucketPath) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder, each sorted. Raises OSError."""
    if storage.is_remote(str(path)):
        found = known(str(path))
        return found.folders.get(str(path), ([], [])) if found else ([], [])
    with os.scandir(str(path)) as entries:
        both = [(entry.name, entry.is_dir()) for entry in entries]
    return sorted(name for name, is_dir in both if is_dir), sorted(name for name, is_dir in both if not is_dir)


def stamp(path: str) -> Stamp:
    """(bytes, time of the last change in ns) of a file; (-1, 0) where that can't be told."""
    try:
        if storage.is_remote(path):
            if found := known(path):
                return found.files.get(path, (-1, 0))
            entry = buckets.parse(path).stat()
            return entry.size, entry.changed_ns
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, 0
    return status.st_size, status.st_mtime_ns
