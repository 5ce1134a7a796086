"""Grain's worker processes, which read batches ahead of the one who asks."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy as np
from absl import flags

from jaxsft.cli import warn
from jaxsft.data import handover
from jaxsft.data.reading import EvalPlan, Reader

STARTED_SECONDS = 60  # after the first batch all workers have started, but for one that was killed at once
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MAIN = threading.Lock()  # who holds it has changed what the main module says of itself
KILLED = re.compile(r"Worker process was terminated .* exit code -(\d+)")  # Grain's message


class WorkerDied(Exception):
    """A signal from outside ended a worker process."""

    def __init__(self, number: int):
        """Of the signal; 0: it is not known."""
        name = signal.Signals(number).name if number else "a signal"
        likely = "most likely for want of memory" if number in (0, signal.SIGKILL) else "see what it printed"
        super().__init__(f"a worker process of the loader was killed by {name}, {likely}")


class Pipeline:
    """Grain's iterator over the batches of the steps from `start`; an evaluation's begins again at its end."""

    def __init__(self, reader: Reader, workers: int, start: int):
        """Start `workers` processes (0: none, batches are read when asked for) and wait for the first batch.

        Where the system lets no processes be started (their semaphores lie in /dev/shm), or no batches be handed over,
        threads of this one read them. A source that can't be sent to another process is read here, by one thread.

        Raises:
          WorkerDied: a process was killed meanwhile.
          OSError: the batch can't be read.
        """
        self._iterator: Any = None
        self._first: dict[str, Any] | None = None
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._handed_over, self._borrowed = handover.possible(), False
        if not workers:
            self._begin(reader, start)
        else:
            try:
                if not self._handed_over and sys.platform.startswith("linux"):
                    raise OSError("memfd is not allowed")  # Grain's own way ends a process that finds /dev/shm full
                self._begin(reader, start, processes=workers)
            except OSError as error:
                warn(f"worker processes can't be used ({one_line(error)}); threads decode instead")
                self._begin(reader, start, threads=workers)
            except Exception:
                if not (reason := unsendable(reader)):
                    raise
                warn(f"{reason}, so that no worker process can read it; this one does, more slowly")
                self._begin(reader, start)

    def _begin(self, reader: Reader, start: int, processes: int = 0, threads: int = 0) -> None:
        import grain

        self._handed_over = self._handed_over and processes > 0
        steps = grain.MapDataset.range(len(reader.plan))
        if isinstance(reader.plan, EvalPlan):  # without an end: with its process a batch goes that nobody has taken
            steps = steps.repeat() if reader.plan.again else grain.MapDataset.range(sys.maxsize)
        if self._handed_over:
            steps = steps[start:].map(dataclasses.replace(reader, empty=handover.empty)).map(handover.Packer())
        else:
            steps = steps[start:].map(reader)
        self._borrowed = processes > 0 and not self._handed_over
        batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if processes:
            options = grain.MultiprocessingOptions(processes, per_worker_buffer_size=1)
            batches = batches.mp_prefetch(options, worker_init_fn=init_worker)
        if not flags.FLAGS.is_parsed():  # Grain reads absl's flags, which our command lines do not use
            flags.FLAGS.mark_as_parsed()
        before = set(multiprocessing.active_children())
        self._iterator = iter(batches)
        try:
            with main_module_left_alone(), signals_blocked():
                self._first = self._read()  # on the way to it Grain starts its processes, in threads
                deadline = time.monotonic() + STARTED_SECONDS
                while len(self._processes) < processes and time.monotonic() < deadline:
                    time.sleep(0.01)
                    now = set(multiprocessing.active_children()) - before
                    self._processes = list(now.union(self._processes))
        except BaseException:
            self.close()
            raise

    def __next__(self) -> dict[str, Any]:
        first, self._first = self._first, None
        return self._read() if first is None else first

    def close(self) -> None:
        """End the processes and drop what they have sent."""
        self._iterator.close()
        self._iterator = self._first = None

    def _read(self) -> dict[str, Any]:
        """The next batch; raises WorkerDied."""
        try:
            batch = next(self._iterator)
            if self._borrowed:  # Grain's shared memory must not outlive the workers, and arrays on a CPU point into it
                return {
                    name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()
                }
            return handover.unpack(batch) if self._handed_over else batch
        except RuntimeError as error:
            if killed := KILLED.search(str(error)):
                raise WorkerDied(int(killed[1])) from None
            raise
        except (handover.Gone, BrokenPipeError, EOFError):
            raise WorkerDied(max([0, *(-(process.exitcode or 0) for process in self._processes)])) from None


def init_worker(index: int, count: int) -> None:
    """What a worker process does first: leave signals to its parent, and see to it that it ends with it.

    A terminal's Ctrl-C and a scheduler's notice go to all processes of the group. The loop answers them, and until it
    has saved it still needs its workers, which it ends itself, unless it is killed.
    """
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, name="parent", daemon=True).start()


def exit_with_parent() -> None:
    """Wait for the end of the parent process, then end this one.

    Not the system's own notice (PR_SET_PDEATHSIG): it comes at the end of the thread that started the process, and
    Grain's end early.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def one_line(error: Exception) -> str:
    """What an exception says, without the lines that Grain adds."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def unsendable(reader: Reader) -> str:
    """Why the source of `reader` can't be pickled, such as one that holds a connection; '' where it can."""
    try:
        cloudpickle.dumps(reader.source)  # as Grain does, which sends classes of a notebook's cells whole
    except Exception as error:  # the source is a stranger's
        return f"a {type(reader.source).__name__} can't be pickled ({one_line(error)})"
    return ""


@contextlib.contextmanager
def main_module_left_alone() -> Iterator[None]:
    """Let the processes that are started meanwhile not run the program's main module.

    A spawned process runs its parent's, which here would be the whole of training, and in a script without
    `if __name__ == "__main__"` all that stands there. It does not where the module names neither itself nor its file.
    """
    main: dict[str, Any] = vars(sys.modules["__main__"])
    with MAIN:
        named: dict[str, Any] = {name: main.pop(name) for name in ("__spec__", "__file__") if name in main}
        main["__spec__"] = None
        try:
            yield
        finally:
            main.update(named)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block IGNORED_SIGNALS in the processes that are started meanwhile; `init_worker` then ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
