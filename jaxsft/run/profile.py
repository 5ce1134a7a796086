"""A profile of some steps of a run: XProf's trace of host and devices, and what then lies in the devices' memory."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator

import jax
from tqdm import tqdm

from jaxsft.cli import UserError, printable, warn
from jaxsft.run.job import Job
from jaxsft.run.working_copy import WorkingCopy

FOLDER, MEMORY = "profile", "memory.prof"
SKIPPED = 3  # calls of the loop before the trace: they compile, and fill the queue
OPTIONS = {"profile": "a number of steps: trace so many into profile/ of the workdir, once they are compiled"}


def steps_of(text: str) -> int:
    """What --profile says; 0 where it is not given.

    Raises:
      UserError: it is no number of steps.
    """
    if text and (not text.isdecimal() or int(text) < 1):
        raise UserError(f"--profile is {text!r}", "give the number of steps to trace, such as 10")
    return int(text or 0)


class Profile:
    """To be entered around the loop of a run, which makes each of its calls inside of `call`.

    The trace begins after the first calls, and ends after `steps` updates or with the loop, however that ends. If a
    profile fails, a warning says so, and the run goes on.
    """

    def __init__(self, job: Job, workdir: WorkingCopy, steps: int):
        """With 0 `steps` nothing is done."""
        self._job, self._steps = job, steps
        # Each process has a folder of its own: two on one machine would write a trace of one name.
        name = f"process{jax.process_index()}" if job.parallel.process_count > 1 else ""
        self._folder, self._place = workdir.path / FOLDER / name, workdir.place / FOLDER
        self._memory = self._place / name / MEMORY if name else self._place / MEMORY
        self._skip, self._traced, self._tracing = SKIPPED, 0, False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop()
        elif self._steps:
            warn("the run ended before anything was traced for --profile")

    @contextlib.contextmanager
    def call(self, steps: range) -> Iterator[None]:
        """Around the call that makes the updates `steps`."""
        if self._steps and not self._skip and not self._tracing:
            self._start()
        self._skip = max(self._skip - 1, 0)
        if not self._tracing:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=steps[-1]):
            yield
        self._traced += len(steps)
        if self._traced >= self._steps:
            self._stop()

    def _start(self) -> None:
        with self._warning():
            self._folder.mkdir(parents=True, exist_ok=True)  # before the trace: JAX can't let go of one it can't write
            jax.block_until_ready(self._job.state)
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def _stop(self) -> None:
        self._tracing = False
        with self._warning():
            try:
                jax.block_until_ready(self._job.state)
            finally:
                jax.profiler.stop_trace()
            (self._folder / MEMORY).write_bytes(jax.profiler.device_memory_profile())
        if self._steps and self._job.parallel.is_main:
            folder, memory = (shlex.quote(str(path)) for path in (self._place, self._memory))
            tqdm.write(
                printable(f"traced {self._traced} steps: xprof --logdir {folder} --port 8791 (pip install xprof)")
            )
            tqdm.write(printable(f"their memory: pprof --web {memory} (go install github.com/google/pprof@latest)"))
        self._steps = 0

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._steps = 0
            warn(f"no profile could be made: {type(error).__name__}: {error}")
