"""What is known of many image files before a run reads them: their sizes, and which are broken.

Each is decoded once, for a cut off file shows in its pixels alone, and so does what turns it. The index is kept in the
user's cache; files that are new or have changed (size, time of modification) are decoded again.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL

from jaxsft import cli, storage
from jaxsft.data import decode, hosts, listing
from jaxsft.data.listing import Stamp
from jaxsft.data.threads import in_order
from jaxsft.progress import progress
from jaxsft.storage import Location


class Index(NamedTuple):
    """One row a file."""

    sizes: np.ndarray  # int32 [N, 2], (height, width) in px; (0, 0) where broken
    errors: list[str]  # '' or why the file can't be read
    version: str  # sha256 of the sizes and times of all files


class Row(NamedTuple):
    """What is kept of a file."""

    stamp: Stamp
    size: tuple[int, int]  # (height, width) in px; (0, 0) where broken
    error: str  # '' or why it can't be read


def index(root: Location, part: str, paths: Sequence[str], upright: bool) -> Index:
    """The index of `paths`, with a progress bar while files are decoded.

    Args:
      root: the folder or file that they were listed from; the cache goes by it and by `upright`.
      part: the split that they are, for the bar.
      paths: of files, absolute.
      upright: whether pictures are turned as `decode.read_rgb` says.
    """
    from jaxsft.models.weights import cache_dir  # brings JAX, which the workers do without

    where = os.path.realpath(root) if isinstance(root, Path) else str(root)
    # Another Pillow may read what this one can't.
    key = hashlib.sha256(f"decoded\0{where}\0{upright}\0{PIL.__version__}".encode(errors="surrogateescape"))
    cached = cache_dir() / "index" / f"{root.name}-{key.hexdigest()[:16]}.npz"
    is_shared = not isinstance(root, Path)  # then each process looks at its share of what the first does not know yet
    process, processes = hosts.share() if is_shared else (0, 1)
    rows = hosts.once(lambda: load(cached)) if is_shared else load(cached)
    stamps = {path: listing.stamp(path) for path in paths}
    fresh = [path for path, mark in stamps.items() if path not in rows or rows[path].stamp != mark]
    mine = fresh[process::processes]
    threads = storage.REQUESTS if is_shared else None
    measured = in_order(lambda path: measure(path, upright), mine, threads=threads)
    bar = progress(measured, desc=f"looking at {root.name} {part}", total=len(mine), unit="image")
    passing: dict[str, str] = {}  # file -> what kept it from being read this time
    found: dict[str, tuple[tuple[int, int], str] | decode.Unreachable] = {}
    try:
        found.update(zip(mine, bar, strict=True))
    finally:  # interrupted, it goes on from there the next time
        for shared in hosts.together(found) if processes > 1 and len(found) == len(mine) else [found]:
            rows |= {path: Row(stamps[path], *row) for path, row in shared.items() if isinstance(row, tuple)}
            passing |= {path: str(row) for path, row in shared.items() if not isinstance(row, tuple)}
        if fresh and process == 0:
            save(cached, {path: row for path, row in rows.items() if path in stamps or listing.is_file(path)})
    found_of = [Row((0, 0), (0, 0), passing[path]) if path in passing else rows[path] for path in paths]
    version = hashlib.sha256(np.array([stamps[path] for path in paths], np.int64).tobytes()).hexdigest()
    sizes = np.array([row.size for row in found_of], np.int32).reshape(-1, 2)
    return Index(sizes, [row.error for row in found_of], version)


def measure(path: str, upright: bool) -> tuple[tuple[int, int], str] | decode.Unreachable:
    """The size of one image, decoded, and why it can't be ('' where it can); or what kept it from being looked at."""
    try:
        width, height = decode.read_rgb(path, upright).size
    except decode.Unreachable as error:
        return error
    except decode.Unreadable as error:
        return (0, 0), str(error)
    return (height, width), ""


def load(path: Location) -> dict[str, Row]:
    """A kept index by file; nothing where there is none or it is damaged."""
    kept = load_arrays(path)
    try:
        paths, errors = (bytes(kept[name]).decode(errors="surrogatepass").split("\0") for name in ("paths", "errors"))
        stamps, sizes = kept["stamps"].tolist(), kept["sizes"].tolist()
        return {p: Row(tuple(s), tuple(z), e) for p, s, z, e in zip(paths, stamps, sizes, errors, strict=True)}
    except (KeyError, ValueError, TypeError):
        return {}


def save(path: Location, rows: dict[str, Row]) -> None:
    """Keep an index for `load`."""
    text = {"paths": list(rows), "errors": [row.error.replace("\0", " ") for row in rows.values()]}
    save_arrays(
        path,
        stamps=np.array([row.stamp for row in rows.values()], np.int64),
        sizes=np.array([row.size for row in rows.values()], np.int32),
        **{k: np.frombuffer("\0".join(v).encode(errors="surrogatepass"), np.uint8) for k, v in text.items()},
    )


def load_arrays(path: Location) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote; nothing where that is not there, or damaged."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception:  # whatever a torn file makes numpy raise: it is only a cache
        return {}


def save_arrays(path: Location, **arrays: Any) -> None:
    """Write an .npz that appears whole or not at all; where it can't be written, a warning is all."""
    try:
        with storage.replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        warn_once(f"{path.parent} can't be written ({error.strerror or error}): done without keeping what was decoded")


@functools.cache
def warn_once(message: str) -> None:
    """A warning about a folder into which more than one file was to go."""
    cli.warn(message)
