"""Orbax checkpoints of a run: the newest few and the best, checked when read, restored onto whatever devices there are.

WORKDIR/checkpoints/STEP/ holds `state`, the TrainState as plain arrays, and `host`, a JSON record of the host's share:
the sums of the metrics, the config, the versions of the libraries, and a checksum of every array and of itself.
Orbax writes in the background under another name and renames at the end, so that a STEP that is there is whole; what a
disk does to it later, the checksums show. Random numbers and the order of the data are functions of seed and step.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.options import MultiprocessingOptions

from jaxsft import storage
from jaxsft.cli import Stop, UserError, warn
from jaxsft.learn.state import TrainState
from jaxsft.run.log import NotFinite
from jaxsft.run.working_copy import FOLDER, WorkingCopy, steps
from jaxsft.storage import Location

SET_ASIDE = "damaged"
LIBRARIES = ("jaxsft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
YEARS = 10**9  # seconds


class Damaged(Exception):
    """A checkpoint can't be read, or is not what was written; the message says how."""


class Unwritten(Stop):
    """A checkpoint can't be written."""


class Restored(NamedTuple):
    """A checkpoint read back: its step, arrays on the host, and the host's record."""

    step: int
    state: Any
    record: dict[str, Any]


class LastAndBest(checkpoint_managers.LatestN):
    """Orbax's preservation policy: the last `n` steps, and `best` where it is set."""

    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Which of `checkpoints`, oldest first, stay."""
        latest = super().should_preserve(checkpoints, context=context)
        return [keep or info.step == self.best for keep, info in zip(latest, checkpoints, strict=True)]


class Checkpoints:
    """The checkpoints of a run that trains: to be entered, so that the last one is whole on the way out.

    The state is the same in all processes of a run, so one of them writes; for the others (`writes` False) a save only
    looks whether the state is finite.
    """

    def __init__(self, workdir: WorkingCopy, keep: int, on_nan: str = "stop", writes: bool = True):
        """Keep the last `keep` and the best; with `on_nan` "stop" a state that is not finite is never saved."""
        self.workdir, self.on_nan, self._keep = workdir, on_nan, keep
        self._manager: ocp.CheckpointManager | None = None
        if not writes:
            return
        self._policy = LastAndBest(n=keep)
        folder = (workdir.path / FOLDER).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # Of a run that was killed while it wrote; the workdir is ours alone. Orbax's own cleanup_tmp_directories is a
        # thread that `close` does not wait for, and which may so remove what the next to open the folder writes.
        for unfinished in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            # Directories at once: where they can't be made, the threads that wait for them would wait ten minutes.
            # The time limit is by the clock on the wall, which may jump.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False, timeout_secs=YEARS),
            create=False,
            multiprocessing_options=MultiprocessingOptions(primary_host=0, active_processes={0}),
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
            if self._manager:
                self._manager.close()
        except Stop:
            if kind is None:  # else what ended the run has been told already
                raise

    def latest_step(self) -> int | None:
        """The newest step on disk or on its way there, None where there is none."""
        return self._manager.latest_step() if self._manager else None

    def path(self, step: int) -> Location:
        """Where the checkpoint of `step` lies."""
        return self.workdir.place / FOLDER / str(step)

    def save(self, state: TrainState, step: int, host: dict[str, Any], best: int | None = None) -> None:
        """Start writing `state` under `step`; it appears whole or not at all. A step that is there stays as it is.

        Then the oldest go, but not the step `best`.

        Raises:
          NotFinite: a parameter is NaN or infinite, and on_nan is "stop".
          Stop: this or an earlier checkpoint can't be written, such as for want of space.
        """
        if self._manager:
            self._policy.best = best
            if step in self._manager.all_steps():
                self._drop_overtaken(self._manager, best)
                return
        arrays = on_host(state)
        if self.on_nan == "stop":
            check_finite(arrays, step)
        if not self._manager:
            return
        self.wait()  # until the one before is in the bucket: this one may drive it from the disk
        record = with_checksum({**host, "versions": versions(), "arrays": describe(arrays)})
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(arrays), host=ocp.args.JsonSave(record))
        try:
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:
            raise self._unwritten(error) from None

    def wait(self) -> None:
        """Wait until what was saved is on disk, and in the bucket. Raises Stop where it can't be."""
        try:
            if self._manager:
                self._manager.wait_until_finished()
            self.workdir.flush()
        except Stop:
            raise
        except Exception as error:
            raise self._unwritten(error) from None

    def _drop_overtaken(self, manager: ocp.CheckpointManager, best: int | None) -> None:
        """Remove what was the best until an evaluation of the newest, saved before it, was better."""
        for old in sorted(manager.all_steps())[: -self._keep]:
            if old != best:
                self.wait()
                manager.delete(old)

    def _unwritten(self, error: Exception) -> Unwritten:
        whole = steps(self.workdir.path)
        left = f"intact: step {', '.join(map(str, whole))}" if whole else "there is no earlier one"
        return Unwritten(
            f"a checkpoint can't be written to {self.workdir.place / FOLDER}: {first_line(error)}; {left}",
            "make room or mend the disk; the same command then resumes",
        )


def newest(
    workdir: Location,
    like: Callable[[dict[str, Any]], Any],
    *,
    set_aside: bool,
    only: int | None = None,
    place: Location | None = None,
) -> Restored | None:
    """The newest intact checkpoint, or `only` that of one step; None where there is none.

    A damaged one is named on stderr and the one before it is taken; with `set_aside` it is moved to WORKDIR/damaged/.

    Args:
      workdir: of the run.
      like: from a checkpoint's record to the (part of the) state to read, its leaves with shape and dtype.
      set_aside: whether this process may move things.
      only: see above.
      place: what to call `workdir` in messages, where it is a copy.

    Raises:
      UserError: it was written by versions of this program or its libraries that keep something else.
    """
    for step in reversed(steps(workdir)):
        if only is not None and step != only:
            continue
        path = workdir / FOLDER / str(step)
        try:
            record = read_record(path)
            return Restored(step, read_arrays(path, record, like(record)), record)
        except Damaged as damage:
            said = f"the checkpoint {(place or workdir) / FOLDER / str(step)} is damaged ({damage})"
        if set_aside and isinstance(workdir, Path):
            moved = move_aside(workdir, workdir / FOLDER / str(step))
            said += f" and now lies in {(place or workdir) / SET_ASIDE / moved.name}"
        warn(f"{said}; the one before it is used")
    return None


def read_arrays(path: Location, record: dict[str, Any], like: Any) -> Any:
    """The arrays of one checkpoint in the structure of `like`, checked against its record.

    Raises:
      Damaged: a file is missing, cut off, or altered.
      UserError: it has no such arrays.
    """
    expected = {name: kind_of(leaf) for name, leaf in named(like).items()}
    differing = [name for name, kind in expected.items() if record["arrays"].get(name, [])[:2] != kind]
    if differing:
        wrote = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        raise UserError(
            f"{path} keeps other arrays than this program ({', '.join(differing[:3])}); it was written by {wrote}",
            "use those versions, or start in another --workdir",
        )
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    arguments = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    try:
        with (
            storage.local_copy(path / "state") as folder,
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
        ):
            arrays = checkpointer.restore(folder.resolve(), args=arguments)
        altered = [name for name, entry in describe(arrays).items() if entry != record["arrays"][name]]
    except Exception as error:  # on damaged files the libraries below raise nearly anything
        raise_if_away(path, error)
        raise Damaged(first_line(error)) from None
    if altered:
        raise Damaged(f"{len(altered)} arrays are not what was written, such as {altered[0]}")
    return arrays


def read_record(path: Location) -> dict[str, Any]:
    """The host's record of a checkpoint. Raises Damaged where it is not what was written."""
    try:
        record = json.loads((path / "host" / "metadata").read_text())
        checksum = record.pop("crc32")
        is_ours = isinstance(record["arrays"], dict) and isinstance(record["versions"], dict)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise_if_away(path, error)
        raise Damaged(f"its record can't be read: {first_line(error)}") from None
    if not is_ours or with_checksum(record)["crc32"] != checksum:
        raise Damaged("its record is not what was written")
    return record


def raise_if_away(path: Location, error: Exception) -> None:
    """Raise a UserError where a bucket does not give what it may well have: that says nothing of the checkpoint."""
    if isinstance(error, OSError) and storage.is_remote(path) and not isinstance(error, FileNotFoundError):
        raise UserError(f"{path} can't be read: {error.strerror}", "try again when it can be") from None


def move_aside(workdir: Path, path: Path) -> Path:
    """Move a damaged checkpoint out of the way, to a name that is free."""
    folder = workdir / SET_ASIDE
    try:
        folder.mkdir(exist_ok=True)
        target, count = folder / path.name, 1
        while target.exists():
            target, count = folder / f"{path.name}.{count}", count + 1
        return path.rename(target)
    except OSError as error:
        raise UserError(f"{path} is damaged and can't be moved away: {error.strerror}", "remove it by hand") from None


def on_host(state: TrainState) -> TrainState:
    """A copy of the state in the host's memory, one array a leaf.

    A true copy: what `device_get` returns on a CPU can be the device's own memory, which the next step overwrites.
    """
    return jax.tree.map(lambda x: np.array(x, order="C"), jax.device_get(state))


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a state by path, such as "params/fc/bias"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def kind_of(leaf: Any) -> list[Any]:
    """[shape, dtype] of an array, as JSON has them."""
    return [list(leaf.shape), str(leaf.dtype)]


def describe(arrays: Any) -> dict[str, list[Any]]:
    """[shape, dtype, crc32] of every leaf by path."""
    return {name: [*kind_of(leaf), zlib.crc32(leaf)] for name, leaf in named(arrays).items()}


def check_finite(arrays: Any, step: int) -> None:
    """Raise NotFinite for the first leaf with a NaN or an infinity."""
    for name, leaf in named(arrays).items():
        if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf).all():
            raise NotFinite(step, f"{name} is not finite")


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the checksum of its own JSON text."""
    return {**record, "crc32": zlib.crc32(json.dumps(record, sort_keys=True).encode())}


@functools.cache  # each save asks; to look through what is installed takes 25 ms
def versions() -> dict[str, str]:
    """The versions of Python and of the libraries whose arithmetic or formats a checkpoint depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # such as jaxsft itself, run from its folder
            continue
    return found


def first_line(error: Any) -> str:
    """What to tell of another library's exception: the system's reason where it names one, else 200 letters of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    if number := re.search(r"(?:os_error_code='|OS error )(\d+)", str(error)):  # TensorStore's ways, in changing places
        return os.strerror(int(number[1]))
    if getattr(error, "strerror", None):
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
