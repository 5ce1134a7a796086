"""A run that leaves nothing on disk: its updates and evaluations, for a search that needs only their numbers."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from ml_collections import ConfigDict

from jaxsft.cli import write_stderr
from jaxsft.interpret.metrics import Evaluation
from jaxsft.run.interrupts import SIGNALS
from jaxsft.run.job import Job
from jaxsft.run.log import Meter, NotFinite
from jaxsft.run.prepare import prepare
from jaxsft.run.shared import Shared
from jaxsft.tune.pool import Splits

OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


class Told(Exception):
    """A signal asks the search to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """The signals that ask a process to end, as a question between two updates; to be entered.

    The first is noted, the second does what it did before.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # of nohup
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        self.__exit__()
        with contextlib.suppress(RuntimeError):  # we interrupt a print
            sys.stdout.flush()
            write_stderr(f"{signal.Signals(number).name}: ending after this update, again ends at once\n")

    def poll(self) -> None:
        """Raise Told where one has come."""
        if self._received:
            raise Told(self._received[0])


def evaluations(
    config: ConfigDict, splits: Splits, shared: Shared, between: Callable[[], None] = lambda: None
) -> Iterator[Evaluation]:
    """Train as `config` says on the first of `splits`, and yield each evaluation on the second; the last is the end's.

    `between` is called after each update and may raise.

    Raises:
      UserError: the config does not allow it.
      NotFinite: a loss is NaN or infinite.
    """
    job, _ = prepare(config, splits, shared)
    meter = Meter(finite=True)
    try:
        job.begin(job, 0)
        for steps in job.calls(0):
            meter.add(steps, job.update(steps))
            between()
            if job.is_evaluated(steps[-1]):
                meter.compute()
                result = job.evaluate(between)
                assert isinstance(result, Evaluation)  # `open_pool` takes no images of several labels
                if not math.isfinite(result.loss):
                    raise NotFinite(steps[-1], f"the loss of the evaluation is {result.loss}")
                yield result
    finally:
        job.close()


def training_losses(job: Job) -> Iterator[float]:
    """The mean loss of the batch of each update, before the update; the network ends with the loop."""
    try:
        for step in range(1, job.total_steps + 1):
            counts = jax.device_get(job.update(range(step, step + 1)))
            yield float(counts["loss"] / counts["count"])
    finally:
        job.close()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the devices or the host had no room."""
    return isinstance(error, MemoryError) or any(word in str(error) for word in OUT_OF_MEMORY)
