"""What a run writes while it trains: `metrics.jsonl` and TensorBoard's event files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxsft import storage
from jaxsft.cli import Stop, UserError
from jaxsft.run.parallel import IN_FLIGHT
from jaxsft.storage import Location

if TYPE_CHECKING:
    from jaxsft.run.events import Events

METRICS, EVENTS = "metrics.jsonl", "events"
ZERO = {"loss": 0.0, "top1": 0, "count": 0}


class NotFinite(Exception):
    """What must be a number is NaN or infinite at `step`: `what`, such as "the loss is nan"."""

    def __init__(self, step: int, what: str):
        super().__init__(f"{what} at step {step}")
        self.step, self.what = step, what


class Meter:
    """Sums of the training metrics since the last line of the log, read without making the device wait.

    Each step is added once, in order, as its call leaves the queue: the sums are the same with and without a resume
    that carries `sums` over. With `finite` a loss that is NaN or infinite raises NotFinite, at most IN_FLIGHT
    calls late.
    """

    def __init__(self, sums: dict[str, Any] | None = None, finite: bool = False):
        self.sums = dict(sums or ZERO)
        self.epoch, self.loss = dict(ZERO), math.nan  # since the last line on the terminal; of the last step
        self._finite = finite
        self._queue: list[tuple[range, dict[str, jax.Array]]] = []

    def add(self, steps: range, counts: dict[str, jax.Array]) -> None:
        """Queue the counts of the steps of one call, which may still be computing.

        Raises:
          NotFinite: the loss of a step that has left the queue, where that is watched.
        """
        self._queue.append((steps, counts))
        self._drain(IN_FLIGHT)

    def compute(self) -> dict[str, Any]:
        """Wait for the queued steps and return the sums. Raises NotFinite as `add` does."""
        self._drain(0)
        return self.sums

    def compute_and_reset(self) -> dict[str, Any]:
        """`compute`, then start again from zero."""
        sums, self.sums = self.compute(), dict(ZERO)
        return sums

    def reset_epoch(self) -> dict[str, Any]:
        """Start the epoch's sums again from zero; returns those of the steps that had left the queue."""
        sums, self.epoch = self.epoch, dict(ZERO)
        return sums

    def _drain(self, keep: int) -> None:
        while len(self._queue) > keep:
            steps, queued = self._queue.pop(0)
            counts = {key: np.atleast_1d(values).tolist() for key, values in jax.device_get(queued).items()}
            for i, step in enumerate(steps):
                if self._finite and not math.isfinite(counts["loss"][i]):
                    raise NotFinite(step, f"the loss is {counts['loss'][i]}")
                self.sums, self.epoch = (
                    {key: sums.get(key, 0) + counts[key][i] for key in counts} for sums in (self.sums, self.epoch)
                )
                self.loss = counts["loss"][i] / max(counts["count"][i], 1)


class Throughput:
    """Images per second of training, without compilation and evaluation."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._images = 0

    def add(self, images: int) -> None:
        """Count images trained on."""
        self._images += images

    def reset(self) -> None:
        """Forget what was measured."""
        self._since, self._images = time.perf_counter(), 0

    def compute_and_reset(self) -> float | None:
        """Images per second since the last start; None where none were counted."""
        elapsed, images = time.perf_counter() - self._since, self._images
        self.reset()
        return images / elapsed if images else None


class Log:
    """metrics.jsonl, one object a line, and the same numbers in TensorBoard's event files.

    Of the processes of a run one writes; for the others (`enabled` False) nothing here does anything.
    """

    def __init__(self, workdir: Path, step: int, enabled: bool = True):
        """Continue after `step`: lines of later steps are removed, for they will be computed again."""
        self.path, self._step, self._enabled = workdir / METRICS, step, enabled
        self._events: Events | None = None
        if not enabled:
            return
        if self.path.exists():
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)
            with stop_on_write_error(self.path):
                partial = self.path.with_suffix(".partial")
                partial.write_text("".join(line for line in lines if is_up_to(line, step)))
                partial.replace(self.path)

    def write(self, split: str, step: int, **values: Any) -> None:
        """Append a line; None values are left out, NaN and infinity are null, and the time is added."""
        if not self._enabled:
            return
        now = time.time()
        values = {name: value for name, value in values.items() if value is not None}
        line = {"step": step, "split": split, **{k: None if is_nan(v) else v for k, v in values.items()}, "time": now}
        with stop_on_write_error(self.path), self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        from jaxsft.run.events import Events  # here, when the devices work: it takes half a second to import

        folder = self.path.with_name(EVENTS)
        with stop_on_write_error(folder):
            if self._events is None:
                folder.mkdir(exist_ok=True)
                self._events = Events(folder / EVENTS, self._step + 1)
            self._events.write(split, step, now, values)

    def has_evaluation(self, step: int) -> bool:
        """Whether the file has the line of this evaluation; asked before the first write, in any process."""
        return any(record["step"] == step and record.get("split") == "eval" for record in records(self.path.parent))

    def sync(self) -> None:
        """Put metrics.jsonl on the disk itself: a checkpoint that outlives a power cut must not be ahead of it."""
        if self._enabled and self.path.exists():
            with stop_on_write_error(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close the event file."""
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a full disk the line that failed has told
            self.close()


@contextlib.contextmanager
def stop_on_write_error(path: Path) -> Iterator[None]:
    """Let a failure to write `path` end the run in one line. Raises Stop."""
    try:
        yield
    except OSError as error:
        what = f"{path} can't be written: {error.strerror or error}"
        raise Stop(what, "make room or mend the disk; the same command then resumes") from error


def is_nan(value: Any) -> bool:
    """Whether `value` is a number that JSON can't hold."""
    return isinstance(value, float) and not math.isfinite(value)


def records(workdir: Location) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without one that was cut off; none where there is no such file."""
    lines = []
    try:
        for line in (workdir / METRICS).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                lines += [record] if isinstance(record, dict) and isinstance(record.get("step"), int) else []
    except OSError as error:
        if storage.is_remote(workdir) and not isinstance(error, FileNotFoundError):
            what = f"{workdir / METRICS} can't be read: {error.strerror}"
            raise UserError(what, "try again when it can be") from None
    return lines


def is_up_to(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is whole and of a step up to `step`."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
