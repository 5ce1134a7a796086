"""Work of many threads in the order in which it is wanted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from jaxsft.run.machine import cores

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 1000  # results that may wait for one before them


def in_order(function: Callable[[Item], Result], items: Iterable[Item], ahead: int = AHEAD) -> Iterator[Result]:
    """`map(function, items)`, computed in a thread a core, up to `ahead` results before they are asked for.

    For functions that spend their time outside Python, as PIL's decoders do. What is left of the work is dropped where
    the iterator is closed.
    """
    pool = ThreadPoolExecutor(cores())
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
