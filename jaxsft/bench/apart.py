"""Contestants in processes of their own, in turns: in one process the thread pools of two disturb each other.

A pool that waits for work spins, and two in one process are both given every core. Of the train step of a ResNet-50 our
ratio to torch was 0.96 in one process and 1.21 apart, on two cores.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from jaxsft.data.pipeline import exit_with_parent

Key = TypeVar("Key")

_made: list[Callable[..., Any]] = []  # in a contestant's process: the function that it is


class Contestant:
    """A function of arguments and results that can be pickled, made and called in a process of its own."""

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: Any):
        """`make(*arguments)`, a function of a module, is called there at the first call and gives the function."""
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent)
        self._make = (make, arguments)

    def __call__(self, *arguments: Any) -> Any:
        """What the function gives. Raises what it or `make` raises."""
        return self.timed(1, *arguments)[1]

    def timed(self, count: int, *arguments: Any) -> tuple[float, Any]:
        """Seconds that `count` calls in a row take, what is sent to the process not among them; what the last gives."""
        return self._pool.submit(_timed, *self._make, count, arguments).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _end_with_parent() -> None:
    """Where the command is killed, its contestants would wait for it for ever."""
    threading.Thread(target=exit_with_parent, name="parent", daemon=True).start()


def _timed(make: Callable[..., Any], settings: tuple[Any, ...], count: int, arguments: Any) -> tuple[float, Any]:
    """`Contestant.timed` in its process."""
    if not _made:
        _made.append(make(*settings))
    result, began = None, time.perf_counter()
    for _ in range(count):
        result = _made[0](*arguments)
    return time.perf_counter() - began, result


@contextlib.contextmanager
def contestants(made: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Contestant]]:
    """A contestant of each name's `make` and its arguments; all processes end afterwards."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(contextlib.closing(Contestant(*how))) for name, how in made.items()}


def medians(
    calls: Mapping[Key, tuple[Contestant, tuple[Any, ...]]], rounds: int, seconds: float = 1.0
) -> dict[Key, float]:
    """Seconds of a call of each: a turn of each in every round, of a turn its mean call, of the rounds the median.

    Of a turn, which takes about `seconds`, the first call is not timed: it takes back from the kernel the memory that
    the last turn let go, which no call in a row of them has to.
    """
    for one, arguments in calls.values():
        one(*arguments)  # which compiles it
    once = {name: one.timed(1, *arguments)[0] for name, (one, arguments) in calls.items()}
    counts = {name: max(round(seconds / spent), 1) for name, spent in once.items()}
    turns: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (one, arguments) in calls.items():
            one(*arguments)
            turns[name].append(one.timed(counts[name], *arguments)[0] / counts[name])
    return {name: statistics.median(spent) for name, spent in turns.items()}
