"""Cores, and the work of a thread on each in the order in which it is wanted."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 1000  # results that may wait for one before them


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int = AHEAD, threads: int | None = None
) -> Generator[Result]:
    """`map(function, items)`, computed in `threads` (a thread a core), up to `ahead` results before they are asked for.

    For functions that spend their time outside Python, as PIL's decoders do. What is left of the work is dropped where
    the iterator is closed.
    """
    pool = ThreadPoolExecutor(threads or cores())
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
