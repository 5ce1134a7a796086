"""`data.cache`: what a run decodes and resizes in its first pass, kept for the next ones and for later runs.

What is kept is what the loader lays out: the canvas that crops are cut from, or the middle that is evaluated, so that a
batch read again is the same to the last bit. It lies as records in files, as packed pictures do (see `records`), in
a folder that goes by the images and the layout. Each process that reads gathers its own records in memory, up to
FILE_BYTES or until the pass ends, and writes them as one file under a name that nobody else has: there is nothing to
lock, to clobber or to mend. A file says in its last record which images are in it; one that is not whole is not there.
Slots of one shape in one large file would need no gathering, but no bucket has them, and small pictures would take the
room of large ones.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import platformdirs

from jaxsft import storage
from jaxsft.buckets import BucketPath
from jaxsft.cli import warn
from jaxsft.data import decode, records
from jaxsft.data.base import Source
from jaxsft.data.packed import Packed
from jaxsft.storage import Location

FILE_BYTES = 64 * 2**20  # that a process gathers before it writes them
LOOK_SECONDS, LOOK_REMOTE_SECONDS = 1.0, 30.0  # between two looks for what others have written
ABANDONED_SECONDS = 24 * 3600  # after which a file that was never finished is nobody's
VERSION = 1


class Cache:
    """Records by the numbers of images; one object a process, which is pickled as new."""

    def __init__(self, place: Location, writes: bool = True):
        """`place` exists, or is in a bucket; without `writes` what is there is read, and that is all."""
        self.place, self.writes = place, writes
        self.folder = place if isinstance(place, Path) else local_folder(place)
        self._found: dict[int, tuple[str, int]] = {}  # number of an image -> (file, number of the record)
        self._files: set[str] = set()
        self._gathered: dict[int, bytes] = {}
        self._bytes = 0
        self._looked = -np.inf
        self._last = -1  # step
        self._said: list[str] = []
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.place, self.writes)

    def get(self, number: int) -> bytes | None:
        """The record of an image; None where there is none, or it is damaged."""
        with self._lock:
            if number in self._gathered:
                return self._gathered[number]
            if number not in self._found:
                self._look()
            place = self._found.get(number)
        try:
            return records.read(*place) if place else None
        except decode.Unreadable:
            with self._lock:
                self._found.pop(number, None)  # it is decoded and written again
            return None

    def put(self, number: int, record: bytes) -> None:
        """Keep the record of an image."""
        with self._lock:
            if self.writes:
                self._gathered[number] = record
                self._bytes += len(record)
                if self._bytes >= FILE_BYTES:
                    self.flush()

    def at(self, step: int, every: int) -> None:
        """Where a step begins another pass, of `every` steps, write what is gathered, for others want it now."""
        every = max(every, 1)
        with self._lock:
            if self._last >= 0 and (step // every != self._last // every or step < self._last):
                self.flush()
            self._last = step

    def flush(self) -> None:
        """Write what is gathered and not there yet. Where that can't be, `said` tells, and nothing more is written."""
        with self._lock:
            if not self._gathered:
                return
            self._look(now=True)
            fresh = {number: record for number, record in self._gathered.items() if number not in self._found}
            self._gathered, self._bytes = {}, 0
            if not fresh:
                return
            name = f"{os.urandom(8).hex()}{records.SUFFIX}"
            try:
                records.write_shard(self.folder / name, [*fresh.values(), numbers_record(fresh)])
                if isinstance(self.place, BucketPath):
                    (self.place / name).upload(self.folder / name)
            except OSError as error:
                self.writes = False
                self._said.append(unwritten(self.place.parent, error))
                return
            self._note(name)

    def said(self) -> list[str]:
        """What went wrong since the last call, for the user; mostly nothing."""
        with self._lock:
            said, self._said = self._said, []
            return said

    def _look(self, now: bool = False) -> None:
        """Learn of files that others have written; not each time when asked."""
        pause = LOOK_SECONDS if isinstance(self.place, Path) else LOOK_REMOTE_SECONDS
        if not now and time.monotonic() < self._looked + pause:
            return
        try:
            if isinstance(self.place, BucketPath):
                storage.mirror(self.place, self.folder)
            for name in sorted(os.listdir(self.folder)):
                if name.endswith(records.SUFFIX) and name[0] != "." and name not in self._files:
                    self._note(name)
        except OSError:
            pass  # then there is nothing to be read
        self._looked = time.monotonic()

    def _note(self, name: str) -> None:
        """Learn what is in a file."""
        self._files.add(name)
        path = str(self.folder / name)
        images = records.count(path) - 1
        try:
            numbers = np.frombuffer(records.read(path, images), np.int64) if images > 0 else np.empty(0, np.int64)
        except (decode.Unreadable, ValueError):
            return
        for position, number in enumerate(numbers.tolist()):
            self._found.setdefault(number, (path, position))


def numbers_record(numbers: Any) -> bytes:
    """The last record of a file: the numbers of the images before it."""
    return np.array([*numbers], np.int64).tobytes()


def local_folder(place: BucketPath) -> Path:
    """Where this machine has the files of a cache in a bucket."""
    return Path(platformdirs.user_cache_dir("jaxsft")) / "cached" / hashlib.sha256(str(place).encode()).hexdigest()[:16]


def unwritten(place: Location, error: OSError) -> str:
    """What to say where nothing can be written."""
    return f"data.cache {place} can't be written ({error.strerror or error}): the run goes on without it"


def open_cache(directory: str, source: Source, layout: Any) -> Cache | None:
    """The cache of the images of a source in a layout; None where they are decoded already.

    And where they can't be known again, which is warned of.

    Args:
      directory: of the config, data.cache; '': there is to be none.
      source: whose images are known by their names, and, where they are files, by their size and time.
      layout: that they are kept in, whose repr says all about it.

    Raises:
      UserError: the address is of a kind that is not known.
    """
    if not directory or (isinstance(source, Packed) and source.decoded):
        return None
    root = storage.location(directory)
    if type(source).name is Source.name:
        warn(f"data.cache: the images of a {type(source).__name__} have no names to know them by: none is kept")
        return None
    place = root / key_of(source, layout)
    try:
        if isinstance(place, Path):
            place.mkdir(parents=True, exist_ok=True)
            for file in place.glob(f".*{records.SUFFIX}"):
                if time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                    file.unlink(missing_ok=True)
        storage.try_to_write(place)
    except OSError as error:
        warn(unwritten(root, error))
        return Cache(place, writes=False)
    return Cache(place)


def key_of(source: Source, layout: Any) -> str:
    """The name of the folder for images in a layout: it goes by all that their pixels depend on."""
    digest = hashlib.sha256(repr((VERSION, PIL.__version__, layout, source.version)).encode())
    for number in range(len(source)):
        digest.update(f"{source.name(number)}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:24]
