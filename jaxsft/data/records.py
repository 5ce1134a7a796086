"""Decoded pictures as records, and files of many records that are read in any order: array_record's, as TFDS has them.

A file of records, a shard in the words of TFDS, WebDataset and MosaicML's streaming, is written whole or not at all.
Its records are not compressed: photographs of 256 px at random then came in 0.14 ms each, with their checksums; zstd
took 15 % less room and 0.45 ms, array_record's own brotli 23 % and 0.53 ms.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsft import storage
from jaxsft.cli import UserError
from jaxsft.data import decode
from jaxsft.storage import Location

SUFFIX = ".array_record"
WRITER = "group_size:1,uncompressed"  # a record alone is read without its neighbours
HEADER = struct.Struct("<8i")  # MAGIC, turned, original height and width, rows, columns of the pixels, 0, 0
MAGIC = 0x31504B4A  # "JKP1"
MOST_OPEN = 512  # files of records that a process holds open; a further one costs 0.2 ms


class Record(NamedTuple):
    """A picture that was decoded and resized before: pixels uint8 [rows, columns, 3].

    `turned`: it is upright and lies on its side, rows and columns swapped, as on a canvas (see `decode.onto_canvas`).
    """

    pixels: np.ndarray
    turned: bool
    original: tuple[int, int]  # (height, width) px, before it was resized

    def image(self) -> np.ndarray:
        """The picture as it is: uint8 [height, width, 3]."""
        return decode.swapped(self.pixels) if self.turned else self.pixels

    def to_bytes(self) -> bytes:
        """For `from_bytes`."""
        rows, columns = self.pixels.shape[:2]
        return HEADER.pack(MAGIC, self.turned, *self.original, rows, columns, 0, 0) + self.pixels.tobytes()


def from_bytes(content: bytes) -> Record:
    """What `Record.to_bytes` wrote; the pixels are a view of it.

    Raises:
      decode.Unreadable: it is something else.
    """
    try:
        magic, turned, height, width, rows, columns, _, _ = HEADER.unpack_from(content)
        pixels = np.frombuffer(content, np.uint8, offset=HEADER.size).reshape(rows, columns, 3)
    except (struct.error, ValueError):
        magic = 0
    if magic != MAGIC or min(height, width, rows, columns) < 1:
        raise decode.Unreadable("its record is damaged")
    return Record(pixels, bool(turned), (height, width))


def on_its_side(pixels: np.ndarray, original: tuple[int, int]) -> Record:
    """The record of a picture uint8 [height, width, 3]: an upright one is turned."""
    turned = pixels.shape[0] > pixels.shape[1]
    return Record(decode.swapped(pixels) if turned else pixels, turned, original)


def array_record() -> Any:
    """The package's module of readers and writers.

    Raises:
      UserError: it is not installed, for it is made for Linux alone.
    """
    if importlib.util.find_spec("array_record") is None:
        raise UserError("packed pictures need the package 'array_record'", "use Linux, where it is installed with us")
    from array_record.python import array_record_module

    return array_record_module


def write_shard(path: Location, records: Iterable[bytes]) -> int:
    """Write a file of records, which appears whole or not at all, here or in a bucket; its size in bytes.

    Raises:
      OSError: it can't be written.
    """
    module = array_record()
    with storage.replacing(path) as partial:
        try:
            writer = module.ArrayRecordWriter(str(partial), WRITER)
            try:
                for record in records:
                    writer.write(record)
            finally:
                writer.close()
        except RuntimeError as error:  # in place of an OSError; the first part says why, the others where
            raise OSError(errno.EIO, str(error).partition(";")[0].rpartition(": ")[2]) from None
        return partial.stat().st_size


@functools.lru_cache(maxsize=MOST_OPEN)
def reader(path: str) -> Any:
    """Random access to a file of records of this machine; one for a process."""
    return array_record().ArrayRecordReader(path, "")


def read(path: str | Path, position: int) -> bytes:
    """A record of a file.

    Raises:
      decode.Unreadable: it is not there, or its checksum is not that of its content.
    """
    try:
        (content,) = reader(str(path)).read([position])
    except (RuntimeError, IndexError, ValueError) as error:
        raise decode.Unreadable(str(error).partition(";")[0] or "its record is damaged") from None
    return bytes(content)


def count(path: str | Path) -> int:
    """How many records a file has; 0 where it is none, or cut off."""
    try:
        found = reader(str(path))
        return int(found.num_records()) if found.ok() else 0
    except (RuntimeError, IndexError, ValueError):
        return 0
