"""Examples that come one by one, computed several at a time: batches of a few shapes, so that all are compiled before.

The sizes are the powers of two up to the largest batch, and that one. A batch begins when the largest is full, or the
oldest example has waited long enough; while one is computed the next gather. What nobody waits for any more, because
the client has gone or the time is over, is dropped before it costs anything.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

Compute = Callable[..., np.ndarray]  # arrays [B, ...] of the examples' parts to one array [B, ...]


class Full(Exception):
    """As many examples wait as may."""


class Ended(Exception):
    """The batcher takes no more, and what waits is not computed."""


class Late(Exception):
    """An example's time was over before its batch began."""


class Part(NamedTuple):
    """One array of an example: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: Any


class Job(NamedTuple):
    """An example that waits."""

    example: tuple[np.ndarray, ...]
    arrived: float  # of time.monotonic()
    deadline: float
    result: Future[np.ndarray]


def batch_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4 and so on up to `most`, which is the last: (1, 2, 4, 6) for 6."""
    return (*(1 << i for i in range((most - 1).bit_length())), most)


class Batcher:
    """A thread that computes what `submit` gives it.

    `warm` compiles every size; after `start` results come; `close` ends it. Any thread may call `submit`.
    """

    def __init__(
        self,
        compute: Compute,
        parts: Sequence[Part],
        *,
        max_batch: int,
        max_wait: float,
        queue: int,
        observe: Callable[[int, int, float], None] = lambda examples, size, seconds: None,
    ):
        """
        Args:
          compute: takes as many arrays as there are `parts`, [B, *shape] each, and returns one [B, ...]; rows do not
            depend on each other, for those that fill up a batch are zeros.
          parts: of an example.
          max_batch: examples that are computed together.
          max_wait: seconds that the first of them waits for others.
          queue: examples that wait, beside those that are being computed.
          observe: told of each batch: its examples, its size, the seconds that it took.
        """
        self.sizes = batch_sizes(max_batch)
        self._compute, self._parts = compute, tuple(parts)
        self._max_wait, self._queue, self._observe = max_wait, queue, observe
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Examples that wait for their batch."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether there is a thread that computes."""
        return self._thread is not None and self._thread.is_alive()

    def warm(self) -> np.ndarray:
        """Compute a batch of zeros of every size, and return what came out for one."""
        results = [self._compute(*(np.zeros((size, *p.shape), p.dtype) for p in self._parts)) for size in self.sizes]
        return results[0]

    def start(self) -> None:
        """Begin to compute."""
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, *example: np.ndarray, deadline: float) -> Future[np.ndarray]:
        """Let one example be computed: its row of the result. Cancelling the future drops it, if it still waits.

        Args:
          example: its parts.
          deadline: of time.monotonic(), after which it is not begun; the future then raises Late.

        Raises:
          Full: too many wait.
          Ended: after `close`.
        """
        result: Future[np.ndarray] = Future()
        with self._changed:
            if self._ended:
                raise Ended
            if len(self._jobs) >= self._queue:
                self._drop()
            if len(self._jobs) >= self._queue:
                raise Full
            self._jobs.append(Job(example, time.monotonic(), deadline, result))
            self._changed.notify()
        return result

    def close(self, timeout: float | None = None) -> None:
        """Take no more examples, compute those that wait, and end the thread; wait for that as long as `timeout`.

        What still waits then raises Ended.
        """
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)
        with self._changed:
            while self._jobs:
                job = self._jobs.popleft()
                if job.result.set_running_or_notify_cancel():
                    job.result.set_exception(Ended())

    def _work(self) -> None:
        """The thread."""
        while jobs := self._take():
            size = next(size for size in self.sizes if size >= len(jobs))
            began = time.monotonic()
            try:
                arrays = [self._stacked(jobs, i, size) for i in range(len(self._parts))]
                rows = self._compute(*arrays)
            except Exception as error:  # theirs to hear of; the next batch may go well
                for job in jobs:
                    job.result.set_exception(error)
                continue
            for job, row in zip(jobs, rows, strict=False):
                job.result.set_result(row)
            self._observe(len(jobs), size, time.monotonic() - began)

    def _take(self) -> list[Job]:
        """The next batch's examples, as soon as it may begin; none: the end."""
        with self._changed:
            while True:
                self._drop()
                if self._jobs:
                    patience = self._jobs[0].arrived + self._max_wait - time.monotonic()
                    if len(self._jobs) >= self.sizes[-1] or patience <= 0 or self._ended:
                        taken = [self._jobs.popleft() for _ in range(min(len(self._jobs), self.sizes[-1]))]
                        running = [job for job in taken if job.result.set_running_or_notify_cancel()]
                        if running:
                            return running
                    else:
                        self._changed.wait(patience)
                elif self._ended:
                    return []
                else:
                    self._changed.wait()

    def _drop(self) -> None:
        """Forget those that nobody waits for."""
        now = time.monotonic()
        kept = deque[Job]()
        for job in self._jobs:
            if job.result.cancelled():
                job.result.set_running_or_notify_cancel()
            elif job.deadline <= now:
                if job.result.set_running_or_notify_cancel():
                    job.result.set_exception(Late())
            else:
                kept.append(job)
        self._jobs = kept

    def _stacked(self, jobs: Sequence[Job], part: int, size: int) -> np.ndarray:
        """A part of all jobs as one array [size, ...], zeros behind them."""
        shape, dtype = self._parts[part]
        stacked = np.zeros((size, *shape), dtype)
        for row, job in enumerate(jobs):
            stacked[row] = job.example[part]
        return stacked
