"""What one process of a run knows, made known to the others, and what each has done of a whole, put together.

In a run of one process these functions do nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from jaxsft.cli import UserError

Value = TypeVar("Value")


def share() -> tuple[int, int]:
    """(this process, number of processes) of the run."""
    import jax  # here: worker processes import this file, and do without

    return jax.process_index(), jax.process_count()


def once(make: Callable[[], Value]) -> Value:
    """What `make` returns in the first process, anything that can be pickled, in all of them; each must call it.

    Raises:
      UserError: the first process's `make` did, in all of them.
    """
    process, processes = share()
    if processes == 1:
        return make()
    made: tuple[Any, str, str] = (None, "", "")
    if process == 0:
        try:
            made = make(), "", ""
        except UserError as error:
            what, _, what_to_do = str(error).rpartition("; ")
            made = None, what, what_to_do
    value, what, what_to_do = pickle.loads(broadcast(pickle.dumps(made)))
    if what:
        raise UserError(what, what_to_do)
    return value


def together(part: Value) -> list[Value]:
    """The `part` of every process, anything that can be pickled, in their order; each must call it."""
    if share()[1] == 1:
        return [part]
    return [pickle.loads(content) for content in gather(pickle.dumps(part))]


def broadcast(content: bytes) -> bytes:
    """The `content` of the first process, in all of them."""
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    own = np.zeros(length, np.uint8)
    if share()[0] == 0:
        own[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own), np.uint8).tobytes()


def gather(content: bytes) -> list[bytes]:
    """The `content` of every process, in their order, in all of them."""
    from jax.experimental import multihost_utils

    lengths = multihost_utils.process_allgather(np.array([len(content)], np.int32)).reshape(-1)
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    found = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(np.asarray(found, np.uint8), lengths, strict=True)]
