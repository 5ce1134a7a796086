"""What one process of a run knows, made known to the others, and what each has done of a whole, put together.

In a run of one process these functions do nothing.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from jaxsft.cli import Stop, UserError

Value = TypeVar("Value")


def share() -> tuple[int, int]:
    """(this process, number of processes) of the run."""
    import jax  # here: worker processes import this file, and do without

    return jax.process_index(), jax.process_count()


def once(make: Callable[[], Value]) -> Value:
    """What `make` returns in the first process, a value of JSON, in all of them; each must call it.

    Raises:
      UserError: the first process's `make` did, in all of them.
    """
    process, processes = share()
    if processes == 1:
        return make()
    message: dict[str, Any] = {}
    if process == 0:
        try:
            message = {"value": make()}
        except Stop as stop:
            message = {"stop": str(stop)}
    message = json.loads(gather(json.dumps(message).encode())[0])
    if "stop" in message:
        what, _, what_to_do = message["stop"].rpartition("; ")
        raise UserError(what, what_to_do)
    return message["value"]


def gather(content: bytes) -> list[bytes]:
    """The `content` of every process, in their order, in all of them; each must call it."""
    from jax.experimental import multihost_utils

    lengths = multihost_utils.process_allgather(np.array([len(content)], np.int32)).reshape(-1)
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    found = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(np.asarray(found, np.uint8), lengths, strict=True)]


def together(part: Value) -> list[Value]:
    """The `part` of every process, anything that can be pickled, in their order; each must call it."""
    if share()[1] == 1:
        return [part]
    return [pickle.loads(content) for content in gather(pickle.dumps(part))]
