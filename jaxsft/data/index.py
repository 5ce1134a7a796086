"""What is known of many image files without decoding them: their sizes, and which are broken.

The index is kept in the user's cache; files that are new or have changed (size, time of modification) are read again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxsft.data import decode


class Index(NamedTuple):
    """One row a file."""

    sizes: np.ndarray  # int32 [N, 2], (height, width) in px; (0, 0) where broken
    errors: list[str]  # '' or why the file can't be read


def stamp(path: str) -> tuple[int, int]:
    """(bytes, time of modification in ns) of a file; (-1, 0) where it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def index(root: Path, part: str, paths: Sequence[str], upright: bool) -> Index:
    """The index of `paths`.

    Args:
      root: the folder or file that they were listed from; the cache goes by it, `part` and `upright`.
      part: the split that they are.
      paths: of files, absolute.
      upright: whether pictures are turned as their EXIF orientation says.
    """
    stamps = np.array([stamp(path) for path in paths], np.int64).reshape(-1, 2)
    from jaxsft.weights import cache_dir  # brings JAX, which the workers do without

    key = hashlib.sha256(f"{root.resolve()}\0{part}\0{upright}".encode()).hexdigest()[:16]
    cached = cache_dir() / "index" / f"{root.name}-{key}.npz"
    known = load(cached)
    sizes, errors = np.zeros((len(paths), 2), np.int32), [""] * len(paths)
    changed = False
    for i, path in enumerate(tqdm(paths, desc=f"indexing {root.name}", unit="file", disable=None, leave=False)):
        row = known.get(path)
        if row is None or row[0] != tuple(stamps[i]):
            row = (tuple(stamps[i]), *measure(path, stamps[i, 0], upright))
            changed = True
        _, sizes[i], errors[i] = row
    if changed or len(known) != len(paths):
        rows = {"paths": np.array(paths), "stamps": stamps, "sizes": sizes, "errors": np.array(errors)}
        save_arrays(cached, **rows)
    return Index(sizes, errors)


def measure(path: str, length: int, upright: bool) -> tuple[tuple[int, int], str]:
    """The size of one image and why it can't be read ('' where it can)."""
    if length <= 0:
        return (0, 0), "no such file" if length < 0 else "an empty file"
    try:
        return decode.read_size(path, upright), ""
    except decode.Unreadable as error:
        return (0, 0), str(error)


def load(path: Path) -> dict[str, tuple[Any, Any, str]]:
    """A kept index: path -> (stamp, size, error); nothing where there is none or it is damaged."""
    try:
        with np.load(path) as rows:
            stamps, sizes = rows["stamps"].tolist(), rows["sizes"].tolist()
            paths, errors = rows["paths"].tolist(), rows["errors"].tolist()
    except Exception:  # whatever a torn file makes numpy raise: it is only a cache
        return {}
    return {p: (tuple(s), tuple(z), e) for p, s, z, e in zip(paths, stamps, sizes, errors, strict=True)}


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write an .npz that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.npz")
    try:
        np.savez(partial, **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
