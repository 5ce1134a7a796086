"""Grain's worker processes, which read batches ahead of the one who asks."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

from absl import flags

from jaxsft.data.reading import EvalPlan, Reader

STARTED_SECONDS = 5  # after the first batch all workers have started, or will do so the slower way


class Pipeline:
    """Grain's iterator over the batches of the steps from `start`; an evaluation's begins again at its end."""

    def __init__(self, reader: Reader, workers: int, start: int):
        import grain

        steps = grain.MapDataset.range(len(reader.plan))
        if isinstance(reader.plan, EvalPlan):
            steps = steps.repeat()
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        batches = steps[start:].map(reader).to_iter_dataset(options)
        if workers:
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=1))
        if not flags.FLAGS.is_parsed():  # Grain reads absl's flags, which our command lines do not use
            flags.FLAGS.mark_as_parsed()
        before = len(multiprocessing.active_children())
        self._iterator = iter(batches)
        with no_main_module(), unheard():
            self._first = next(self._iterator)  # on the way to it Grain starts its processes, in threads
            deadline = time.monotonic() + STARTED_SECONDS
            while len(multiprocessing.active_children()) < before + workers and time.monotonic() < deadline:
                time.sleep(0.01)

    def __next__(self) -> dict[str, Any]:
        first, self._first = self._first, None
        return next(self._iterator) if first is None else first

    def close(self) -> None:
        """End the processes and drop what they have sent."""
        self._iterator.close()
        self._iterator = self._first = None


@contextlib.contextmanager
def no_main_module() -> Iterator[None]:
    """Let processes that are started meanwhile do without the program's main module.

    A spawned process imports its parent's, which here would be the whole of training.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Let processes that are started meanwhile be deaf to SIGINT and SIGTERM.

    A terminal's Ctrl-C and a scheduler's notice go to all processes of the group. The loop answers them, and until it
    has saved it still needs its workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
