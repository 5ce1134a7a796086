"""Host side: a set, held on the devices or streamed to them, as the batches of training or of evaluation.

`Resident` puts a whole set of small images on every device once; a batch is then the numbers of its examples. `Stream`
decodes and resizes in Grain's worker processes and sends uint8 pixels. To the loop both are the same.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxsft.cli import Stop, UserError, printable, warn
from jaxsft.data.augment import RANDOM_CROP
from jaxsft.data.base import LONG, Arrays, Part, Source
from jaxsft.data.cache import open_cache
from jaxsft.data.files import broken
from jaxsft.data.pipeline import Pipeline, WorkerDied, one_line
from jaxsft.data.reading import LONGEST, Layout, PartPlan, Plan, Reader
from jaxsft.data.threads import cores, in_order
from jaxsft.models.weights import Preprocessing

DEATHS = 3  # of worker processes, with no batch between them, before their number must be wrong
MOST_WORKERS = 16  # by default; more seldom decode faster than one device trains
BAD_FILES = "bad_files.txt"


class Devices(Protocol):
    """What a loader needs of `parallel.DataParallel`, and who goes through its batches."""

    def replicate(self, tree: Any) -> Any: ...
    def split(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]: ...
    def join(self, found: Any) -> Any: ...


class BadFiles:
    """The images that a run left out; the first is an error where on_error is 'raise'."""

    def __init__(self, on_error: str = "raise"):
        self.on_error = on_error
        self.found: dict[str, str] = {}  # file -> reason
        self._path: Path | None = None

    def __len__(self) -> int:
        return len(self.found)

    def add(self, bad: Sequence[tuple[str, str]]) -> None:
        """Note pairs (file, reason).

        Raises:
          UserError: there is one, and on_error is 'raise'.
        """
        for file, reason in bad:
            if self.on_error == "raise":
                raise broken(file, reason)
            if file not in self.found:
                self.found[file] = reason
                warn(f"left out {file}: {reason}")
                self._append(file, reason)

    def write_to(self, workdir: Path) -> None:
        """List them in `workdir`/bad_files.txt, those found from now on too; without any there is no file.

        A line is file, tab, reason; control characters in them are escaped.

        Raises:
          Stop: it can't be written; so does `add`.
        """
        self._path = workdir / BAD_FILES
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise unwritten(self._path, error) from error
        for file, reason in self.found.items():
            self._append(file, reason)

    def _append(self, file: str, reason: str) -> None:
        if self._path is not None:
            try:
                with self._path.open("a", encoding="utf-8") as out:
                    out.write(f"{printable(file)}\t{printable(reason)}\n")
            except OSError as error:
                raise unwritten(self._path, error) from error


def unwritten(path: Path, error: OSError) -> Stop:
    """What to say where the list of bad files can't be written."""
    return Stop(f"{path} can't be written: {error.strerror}", "make room or mend it; the same command then resumes")


class Loader(Protocol):
    """A set as the loops see it."""

    devices: Devices
    dataset: Any  # {"images", "labels"} on them, or {} where the batches bring their pixels
    preprocessing: Preprocessing  # what is left to be done to the images on the device

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of a step (from 0) on the devices; steps are best asked for in their order."""

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """All batches of an evaluation."""

    def blank(self) -> dict[str, jax.Array]:
        """A batch of the shapes that all others have, for who compiles: nothing is read for it."""

    def close(self) -> None:
        """End the worker processes, where there are any; the next batch starts new ones."""


def on_devices(source: Arrays, devices: Devices) -> dict[str, jax.Array]:
    """A set on every device: {"images": uint8 [N, H, W, 3], "labels": int32 [N]}."""
    return devices.replicate({"images": source.images, "labels": source.labels})


class Resident:
    """A set that is on every device, the `dataset` of `on_devices`."""

    def __init__(self, dataset: dict[str, jax.Array], plan: Plan, devices: Devices, preprocessing: Preprocessing):
        self.dataset, self.plan, self.devices, self.preprocessing = dataset, plan, devices, preprocessing

    def batch(self, step: int) -> dict[str, jax.Array]:
        """See Loader."""
        return self.devices.split(self.plan[step])

    def blank(self) -> dict[str, jax.Array]:
        """See Loader."""
        return self.batch(0)

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """See Loader."""
        return map(self.batch, range(len(self.plan)))

    def close(self) -> None:
        """See Loader."""


class WithUnlabelled:
    """A training set, and beside each of its batches one of unlabelled images, whose names begin with "unlabelled_"."""

    def __init__(self, labelled: Loader, unlabelled: Loader):
        self.labelled, self.unlabelled, self.preprocessing = labelled, unlabelled, labelled.preprocessing
        self.devices = labelled.devices
        images = {name: value for name, value in unlabelled.dataset.items() if name == "images"}
        self.dataset = {**labelled.dataset, **{f"unlabelled_{name}": value for name, value in images.items()}}

    def batch(self, step: int) -> dict[str, jax.Array]:
        """See Loader."""
        return self._beside(self.labelled.batch(step), self.unlabelled.batch(step))

    def blank(self) -> dict[str, jax.Array]:
        """See Loader."""
        return self._beside(self.labelled.blank(), self.unlabelled.blank())

    def _beside(self, labelled: dict[str, jax.Array], unlabelled: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {**labelled, **{f"unlabelled_{name}": value for name, value in unlabelled.items()}}

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """See Loader; of the labelled images alone."""
        return self.labelled.batches()

    def close(self) -> None:
        """See Loader."""
        self.labelled.close()
        self.unlabelled.close()


class Sent:
    """An array of the host, or of a file, whose rows go to the devices with each batch."""

    def __init__(self, source: Arrays, plan: Plan, devices: Devices, preprocessing: Preprocessing):
        self.dataset: dict[str, Any] = {}
        self.source, self.plan, self.devices, self.preprocessing = source, plan, devices, preprocessing

    def batch(self, step: int) -> dict[str, jax.Array]:
        """See Loader."""
        numbers = self.plan[step]
        rows = numbers["example"]
        return self.devices.split({"image": self.source.images[rows], "label": self.source.labels[rows], **numbers})

    def blank(self) -> dict[str, jax.Array]:
        """See Loader."""
        return self.batch(0)

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """See Loader."""
        return map(self.batch, range(len(self.plan)))

    def close(self) -> None:
        """See Loader."""


class Stream:
    """A set that is decoded as it is needed.

    Memory is bounded: of each worker process there are the batch that it works on and up to four that are ready. The
    loop asks for a batch while the devices still compute the steps before (dispatch is asynchronous), so that it is on
    them in time. After an evaluation the workers stay and make ready the first batches of the next. Where one of them
    is killed, all start again at that step: a batch is a function of its step, so nothing changes.
    """

    def __init__(
        self,
        reader: Reader,
        devices: Devices,
        preprocessing: Preprocessing,
        workers: int,
        bad: BadFiles,
        in_threads: bool = False,
    ):
        """`workers` are processes (0: none); with `in_threads` threads of this one, which are there at once."""
        self.dataset: dict[str, Any] = {}
        self.reader, self.devices, self.preprocessing = reader, devices, preprocessing
        self.workers, self.bad, self.in_threads = workers, bad, in_threads
        self._pipeline: Pipeline | Generator[dict[str, Any]] | None = None
        self._next = 0  # the step that comes next
        self._said: set[str] = set()
        self._deaths = 0  # of workers, since the last batch

    def batch(self, step: int) -> dict[str, jax.Array]:
        """See Loader.

        Raises:
          UserError: an image is broken, and on_error is 'raise'.
          Stop: workers are killed again and again, or the system can't give what they need.
        """
        batch = None
        while batch is None:
            try:
                batch = self._read(step)
            except WorkerDied as death:
                self._after(death, step)
            except (OSError, MemoryError) as error:
                self.close()
                raise Stop(
                    f"the loader can't make batch {step}: {one_line(error)}",
                    "mend that, or give fewer --config.data.workers; the same command then resumes",
                ) from error
        self._deaths = 0
        for line in set(batch.pop("said", ())) - self._said:  # once, not for each worker
            self._said.add(line)
            warn(line)
        self._next = (step + 1) % len(self.reader.plan)
        try:
            self.bad.add([(self.reader.source.name(number), reason) for number, reason in batch.pop("bad")])
        except UserError:
            self.close()
            raise
        return self.devices.split({name: self._whole(value) for name, value in batch.items()})

    def blank(self) -> dict[str, jax.Array]:
        """See Loader."""
        return self.devices.split({name: self._whole(value) for name, value in self.reader.blank().items()})

    def _read(self, step: int) -> dict[str, Any]:
        """The batch of a step on the host; raises as the pipeline does."""
        if self._pipeline is None or step != self._next:
            self.close()
            if self.in_threads:
                steps = range(step, len(self.reader.plan))
                self._pipeline = in_order(self.reader, steps, self.workers, max(self.workers, 1))
            else:
                self._pipeline = Pipeline(self.reader, self.workers, step)
            # At the end of the program too, while all that closing needs is still there.
            self._finalizer = weakref.finalize(self, self._pipeline.close)
        return next(self._pipeline)

    def _after(self, death: WorkerDied, step: int) -> None:
        """Make ready for another try, unless there have been too many."""
        self.close()
        self._deaths += 1
        if self._deaths == DEATHS:
            raise Stop(
                f"{death}, {DEATHS} times at batch {step}",
                f"give fewer --config.data.workers (now {self.workers}) or a smaller --config.data.batch_size; the same"
                " command then resumes",
            ) from death
        warn(f"{death}; all start again at batch {step}")

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """See Loader."""
        return map(self.batch, range(len(self.reader.plan)))

    def close(self) -> None:
        """See Loader."""
        if self._pipeline is not None:
            self._finalizer()
            self._pipeline = None
        if self.reader.cache:
            self.reader.cache.flush()  # what this process itself has read

    def _whole(self, rows: np.ndarray) -> np.ndarray:
        """This process's rows at their place in the global batch, whose other rows are never looked at."""
        process, processes = self.reader.share
        if processes == 1:
            return rows
        whole = np.empty((len(rows) * processes, *rows.shape[1:]), rows.dtype)
        whole[process * len(rows) : (process + 1) * len(rows)] = rows
        return whole


def layout_of(source: Source, preprocessing: Preprocessing, names: Sequence[str]) -> tuple[Layout, Preprocessing]:
    """How the images of a stream are laid out, and what is then left to be done on the device.

    Images of one size up to the recipe's go to the device as they are: nothing smaller holds as much. Not so long and
    thin ones, which the device would resize whole before it cuts their middle out.
    """
    resize, crop, how = preprocessing.resize_size, preprocessing.crop_size, preprocessing.interpolation
    if source.size is not None and min(source.size) <= resize and max(source.size) <= LONG * min(source.size):
        return Layout("whole", source.size, resize, how), preprocessing
    if RANDOM_CROP in names:
        return Layout("canvas", (resize, round(LONGEST * resize)), resize, how), preprocessing
    return Layout("middle", (crop, crop), resize, how), dataclasses.replace(preprocessing, resize_size=crop)


def check_packed(source: Source, to: Preprocessing) -> None:
    """Raise a UserError where pictures were resized, when they were packed, to less than a run needs, or otherwise."""
    if source.shrunk is None:
        return
    size, how = source.shrunk
    if size < to.resize_size:
        raise UserError(
            f"the pictures were packed at {size} px, and this run resizes them to {to.resize_size}",
            f"pack them again with --size={to.resize_size}",
        )
    if how != to.interpolation:
        raise UserError(
            f"the pictures were packed with {how} interpolation, and this run's is {to.interpolation}",
            f"pack them again with --interpolation={to.interpolation}",
        )


def make_loader(
    source: Source,
    plan: Plan,
    devices: Devices,
    preprocessing: Preprocessing,
    *,
    augmentations: Sequence[str] = (),
    workers: int | None = None,
    share: tuple[int, int] = (0, 1),
    bad: BadFiles | None = None,
    dataset: dict[str, jax.Array] | None = None,
    cache: str = "",
) -> Loader:
    """The loader of a source: `Resident` for arrays and parts of them, else `Stream`.

    Args:
      source: what to load.
      plan: which examples make up each step.
      devices: where to.
      preprocessing: of the model.
      augmentations: of training; they decide how much of a picture the device needs.
      workers: processes that decode; None: one a core, at most 16; 0: none, in this process.
      share: (this process, number of processes) of a run on many machines: what part of each batch a stream reads.
      bad: where broken images are noted.
      dataset: of `on_devices`, where it is there already; of a part that of the whole.
      cache: of the config, data.cache: where a stream keeps what it has decoded.

    Raises:
      UserError: a broken image was left out and `bad` is for none, or the pictures were packed for another size.
    """
    check_packed(source, preprocessing)
    bad = BadFiles() if bad is None else bad
    bad.add(source.bad)
    if isinstance(source, Arrays | Part):
        whole = source.whole if isinstance(source, Part) else source
        dataset = on_devices(whole, devices) if dataset is None else dataset
        own = PartPlan(plan, source.rows) if isinstance(source, Part) else plan
        return Resident(dataset, own, devices, preprocessing)
    layout, left = layout_of(source, preprocessing, augmentations)
    count = min(cores(), MOST_WORKERS) if workers is None else workers
    reader = Reader(source, plan, layout, share, cache=open_cache(cache, source, layout))
    return Stream(reader, devices, left, count, bad)
