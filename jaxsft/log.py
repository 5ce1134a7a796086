"""What a run writes while it trains: `metrics.jsonl`, TensorBoard's event files, a progress bar."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

IN_FLIGHT = 2  # steps dispatched beyond the one whose numbers the host reads
ZERO = {"loss": 0.0, "top1": 0, "count": 0}


class Meter:
    """Sums of the training metrics since the last line of the log, read without making the device wait.

    Each step is added once, in order, as it leaves the queue: the sums are the same with and without a resume that
    carries `sums` over.
    """

    def __init__(self, sums: dict[str, Any] | None = None):
        self.sums = dict(sums or ZERO)
        self._queue: list[dict[str, jax.Array]] = []

    def add(self, counts: dict[str, jax.Array]) -> None:
        """Queue the counts of a step that may still be computing."""
        self._queue.append(counts)
        self._drain(IN_FLIGHT)

    def settle(self) -> dict[str, Any]:
        """Wait for the queued steps and return the sums."""
        self._drain(0)
        return self.sums

    def take(self) -> dict[str, Any]:
        """`settle`, and begin anew."""
        sums, self.sums = self.settle(), dict(ZERO)
        return sums

    def _drain(self, keep: int) -> None:
        while len(self._queue) > keep:
            counts = jax.device_get(self._queue.pop(0))
            self.sums = {key: self.sums[key] + counts[key].item() for key in self.sums}


class Speed:
    """Images per second of training, without compilation and evaluation."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._images = 0

    def add(self, images: int) -> None:
        """Count images trained on."""
        self._images += images

    def restart(self) -> None:
        """Forget what was measured."""
        self._since, self._images = time.perf_counter(), 0

    def take(self) -> float | None:
        """Images per second since the last start; None where none were counted."""
        elapsed, images = time.perf_counter() - self._since, self._images
        self.restart()
        return images / elapsed if images else None


class Log:
    """metrics.jsonl, one object a line, and the same numbers in TensorBoard's event files."""

    def __init__(self, workdir: Path, step: int):
        """Continue after `step`: lines of later steps are removed, for they will be computed again."""
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines(keepends=True) if is_up_to(line, step)]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(kept))
            partial.replace(self.path)
        self._events = SummaryWriter(str(workdir), purge_step=step + 1)

    def write(self, split: str, step: int, **values: Any) -> None:
        """Append a line; None values are left out, and the time is added."""
        values = {name: value for name, value in values.items() if value is not None}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "split": split, **values, "time": time.time()}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._events.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flush the event files."""
        self._events.close()


def is_up_to(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is whole and of a step up to `step`."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def progress(total_images: int, done: int) -> Any:
    """A bar with the time left and images per second, on a terminal only."""
    return tqdm(total=total_images, initial=done, unit="img", unit_scale=True, disable=None, leave=False)
