"""Batches from a worker process to the one that trains: in anonymous memory, of which only the number is sent.

Such memory (memfd of Linux) needs no room in /dev/shm, which is 64 MB in a container and may be missing, and it is gone
with the last process that has it open, however that process ends. The message stays so short that it is in the queue
whole or not at all, whenever a worker is killed.

A worker writes pixels where they are handed over, and gets the memory back when the last array in it is gone: what the
system takes to clear fresh memory is twice as long as the copying of pixels into it.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import pickle
import weakref
from typing import Any, NamedTuple

import numpy as np

TAKEN, BACK = 1, 2  # the first byte, 0 until then
ALIGNED = 64  # bytes; where arrays begin, as JAX wants them that are not to be copied on a CPU
MOST_LENT = 32  # pieces of memory of which a worker waits to get them back; more are whoever's has them
MOST_BACK = 4  # pieces that it keeps for its next batches


class Gone(Exception):
    """The process that packed has ended, and with it what it held."""


class Parcel(NamedTuple):
    """Where a packed value is: its pickle, and the arrays in it."""

    process: int
    pieces: tuple[tuple[int, int], ...]  # (descriptor, inode, by which it is not another file's by now)
    parts: tuple[tuple[int, int, int], ...]  # (number of the piece, first byte, bytes)


class Memory(mmap.mmap):
    """A piece of memory that is given back when nothing points into it any more."""

    def __del__(self) -> None:
        if not self.closed:
            self[0] = BACK


@dataclasses.dataclass(eq=False)
class Piece:
    """Memory of this process that others open."""

    descriptor: int
    memory: mmap.mmap
    is_sent: bool = False

    @classmethod
    def of(cls, length: int) -> Piece:
        """New memory. Raises OSError."""
        descriptor = os.memfd_create("jaxsft-batch")
        try:
            os.ftruncate(descriptor, length)
            return cls(descriptor, mmap.mmap(descriptor, length))
        except BaseException:
            os.close(descriptor)
            raise

    def is_free(self) -> bool:
        """Whether it was sent and is back."""
        return self.is_sent and self.memory[0] == BACK


class Pool:
    """The memory of a worker process: what is being filled, what is sent, and what is back."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        weakref.finalize(self, close_all, self.pieces)

    def take(self, length: int) -> Piece:
        """A piece with room for `length` bytes from ALIGNED on: one that is back, where there is one of that length.

        Raises:
          OSError: there is no memory.
        """
        whole = ALIGNED + max(length, 1)
        found = next((piece for piece in self.pieces if piece.is_free() and len(piece.memory) == whole), None)
        # Whoever keeps a batch keeps its memory, but not this process's number for it.
        lent = [piece for piece in self.pieces if piece.is_sent and piece.memory[0] == TAKEN]
        for piece in lent[: max(len(lent) - MOST_LENT, 0)]:
            self.drop(piece)
        if found is None:
            found = Piece.of(whole)
            self.pieces.append(found)
        found.is_sent, found.memory[0] = False, 0
        return found

    def tidy(self) -> None:
        """Drop what was filled for nothing, and what is back but MOST_BACK pieces."""
        for piece in [piece for piece in self.pieces if not piece.is_sent]:
            self.drop(piece)
        for piece in [piece for piece in self.pieces if piece.is_free()][:-MOST_BACK]:
            self.drop(piece)

    def drop(self, piece: Piece) -> None:
        """Close it; who has it open keeps it."""
        self.pieces.remove(piece)
        os.close(piece.descriptor)

    def holding(self, part: memoryview) -> Piece | None:
        """The piece that is being filled and of which this is all, where there is one."""
        address = address_of(part)
        for piece in self.pieces:
            here = not piece.is_sent and len(piece.memory) == ALIGNED + len(part)
            if here and address_of(memoryview(piece.memory)) + ALIGNED == address:
                return piece
        return None


def close_all(pieces: list[Piece]) -> None:
    """Close them."""
    for piece in pieces:
        os.close(piece.descriptor)


def address_of(part: memoryview) -> int:
    """Where memory begins."""
    return int(np.frombuffer(part, np.uint8).__array_interface__["data"][0]) if len(part) else 0


POOL = Pool()  # of this process


def empty(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    """As `np.empty`, of memory that a Packer of this process hands over as it is. Raises OSError."""
    length = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(POOL.take(length).memory, dtype, math.prod(shape), ALIGNED).reshape(shape)


def possible() -> bool:
    """Whether this machine has such memory, and lets one process open another's."""
    packer = Packer()
    try:
        return bool(unpack(packer(True)))
    except (AttributeError, OSError, Gone):
        return False


class Packer:
    """Packs values, and keeps each until it has been taken: `Packer()(value)` is its Parcel."""

    def __call__(self, value: Any) -> Parcel:
        """Pack anything that can be pickled; its arrays are not copied more than once, and those of `empty` not at all.

        Raises:
          OSError: there is no memory.
        """
        buffers: list[pickle.PickleBuffer] = []
        whole = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        contents = [memoryview(whole), *(buffer.raw() for buffer in buffers)]
        holding = [POOL.holding(part) for part in contents]
        small = [part for part, piece in zip(contents, holding, strict=True) if piece is None]
        begins = places([len(part) for part in small])
        rest = POOL.take(begins[-1] + len(small[-1]) - ALIGNED)
        for begin, part in zip(begins, small, strict=True):
            rest.memory[begin : begin + len(part)] = part
        used = list(dict.fromkeys([rest, *(piece for piece in holding if piece)]))
        left = iter(begins)
        parts = tuple(
            (used.index(piece or rest), ALIGNED if piece else next(left), len(part))
            for part, piece in zip(contents, holding, strict=True)
        )
        for piece in used:
            piece.is_sent = True
        POOL.tidy()
        pieces = tuple((piece.descriptor, os.fstat(piece.descriptor).st_ino) for piece in used)
        return Parcel(os.getpid(), pieces, parts)


def places(lengths: list[int]) -> list[int]:
    """Where parts of these lengths begin, in bytes; after the first byte."""
    begins, end = [], 1
    for length in lengths:
        begins.append(-(-end // ALIGNED) * ALIGNED)
        end = begins[-1] + length
    return begins


def unpack(parcel: Parcel) -> Any:
    """Take what was packed; its arrays are views of the memory, which goes back with the last of them.

    Raises:
      Gone: the process that packed it has ended.
    """
    pieces = [opened(parcel.process, *piece) for piece in parcel.pieces]
    whole, *buffers = (memoryview(pieces[piece])[begin : begin + length] for piece, begin, length in parcel.parts)
    return pickle.loads(whole, buffers=buffers)


def opened(process: int, descriptor: int, inode: int) -> Memory:
    """A piece of another process's memory. Raises Gone."""
    try:
        own = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        raise Gone from None
    try:
        if os.fstat(own).st_ino != inode:
            raise Gone
        memory = Memory(own, 0)
        memory[0] = TAKEN
        return memory
    finally:
        os.close(own)
