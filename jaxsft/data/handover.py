"""Batches from a worker process to the one that trains: in anonymous memory, of which only the number is sent.

Such memory (memfd of Linux) needs no room in /dev/shm, which is 64 MB in a container and may be missing, and it is gone
with the last process that has it open, however that process ends. The message stays so short that it is in the queue
whole or not at all, whenever a worker is killed.
"""

from __future__ import annotations

import mmap
import os
import pickle
import weakref
from typing import Any, NamedTuple

TAKEN = b"\1"  # the first byte, 0 until then
ALIGNED = 64  # bytes; where arrays begin
CHUNK = 2**30  # bytes; a single write may not be as long as an array


class Gone(Exception):
    """The process that packed has ended, and with it what it held."""


class Parcel(NamedTuple):
    """Where a packed value is."""

    process: int
    descriptor: int
    inode: int  # that the descriptor is not another file's by now
    lengths: tuple[int, ...]  # bytes of the pickle, and of each array in it


def possible() -> bool:
    """Whether this machine has such memory, and lets one process open another's."""
    packer = Packer()
    try:
        return bool(unpack(packer(True)))
    except (AttributeError, OSError, Gone):
        return False


class Packer:
    """Packs values, and keeps each until it has been taken: `Packer()(value)` is its Parcel.

    One a process: it is pickled as new.
    """

    def __init__(self) -> None:
        self._open: list[int] = []
        weakref.finalize(self, close_all, self._open)

    def __reduce__(self) -> tuple[type[Packer], tuple[()]]:
        return Packer, ()

    def __call__(self, value: Any) -> Parcel:
        """Pack anything that can be pickled; its arrays are not copied more than once.

        Raises:
          OSError: there is no memory.
        """
        buffers: list[pickle.PickleBuffer] = []
        whole = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        parts = [memoryview(whole), *(buffer.raw() for buffer in buffers)]
        for descriptor in [number for number in self._open if os.pread(number, 1, 0) == TAKEN]:
            os.close(descriptor)
            self._open.remove(descriptor)
        descriptor = os.memfd_create("jaxsft-batch")
        self._open.append(descriptor)
        for begin, part in zip(places([len(part) for part in parts]), parts, strict=True):
            written = 0
            while written < len(part):
                written += os.pwrite(descriptor, part[written : written + CHUNK], begin + written)
        return Parcel(os.getpid(), descriptor, os.fstat(descriptor).st_ino, tuple(map(len, parts)))


def close_all(descriptors: list[int]) -> None:
    """Close them."""
    for descriptor in descriptors:
        os.close(descriptor)


def places(lengths: list[int]) -> list[int]:
    """Where parts of these lengths begin, in bytes; after the first byte."""
    begins, end = [], 1
    for length in lengths:
        begins.append(-(-end // ALIGNED) * ALIGNED)
        end = begins[-1] + length
    return begins


def unpack(parcel: Parcel) -> Any:
    """Take what was packed; its arrays are views of the memory, which is freed with the last of them.

    Raises:
      Gone: the process that packed it has ended.
    """
    try:
        descriptor = os.open(f"/proc/{parcel.process}/fd/{parcel.descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        raise Gone from None
    try:
        if os.fstat(descriptor).st_ino != parcel.inode:
            raise Gone
        memory = memoryview(mmap.mmap(descriptor, 0))
        os.pwrite(descriptor, TAKEN, 0)
    finally:
        os.close(descriptor)
    begins = places(list(parcel.lengths))
    whole, *buffers = (memory[begin : begin + length] for begin, length in zip(begins, parcel.lengths, strict=True))
    return pickle.loads(whole, buffers=buffers)
