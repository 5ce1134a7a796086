"""A run's directory: config.json, model.json, data.json, metrics.jsonl, checkpoints/, events/ and its lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxsft import config as config_module
from jaxsft import storage
from jaxsft.cli import UserError
from jaxsft.data.fingerprint import classes_difference, difference
from jaxsft.models.weights import ModelCard, check_name
from jaxsft.run import checkpoint, saved
from jaxsft.run.best import is_finite
from jaxsft.run.lease import Lease
from jaxsft.run.log import records
from jaxsft.run.saved import CONFIG, read_json
from jaxsft.run.working_copy import LOCK, WorkingCopy
from jaxsft.storage import Location

DATA = "data.json"


def check(workdir: Location, config: ConfigDict) -> None:
    """Find out before any work whether `config` can run in `workdir`; leaves nothing behind.

    Raises:
      UserError: the directory holds a run of another config, a run that is going on, something else, or can't be
        written.
    """
    existing = workdir.absolute() if isinstance(workdir, Path) else workdir
    while isinstance(existing, Path) and not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        storage.try_to_write(existing)
    except OSError as error:
        raise UserError(f"{workdir} can't be written: {error.strerror}", "give another --workdir") from None
    check_name(workdir)
    check_config(workdir, config)
    if isinstance(workdir, Path) and (workdir / LOCK).exists():
        with lock(workdir):
            pass


def check_config(workdir: Location, config: ConfigDict) -> None:
    """Raise a UserError where `workdir` holds a run of another config, or something that is no run."""
    if not saved.is_run(workdir):
        if workdir.exists() and any(not path.name.startswith(LOCK) for path in workdir.iterdir()):
            raise UserError(f"{workdir} is not empty and holds no run", "give another --workdir")
        return
    there = settings(saved.config_record(workdir))
    here = settings(json.loads(config_module.to_json(config)))
    differing = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if differing:
        listed = ", ".join(f"{key} ({there.get(key)!r} there, {here.get(key)!r} here)" for key in differing)
        raise UserError(
            f"{workdir} holds a run of another config: {listed}",
            f"give another --workdir; there --config.model.weights={workdir} goes on from what this run has learnt",
        )


def check_data(workdir: Location, card: ModelCard, data: dict[str, Any], on_changed: str) -> None:
    """Find out before anything is written whether a run that is to be resumed finds the data that it began with.

    Args:
      workdir: of the run.
      card: what the model would be now.
      data: the fingerprint of the data now.
      on_changed: 'stop', or 'continue' with other data of as many classes, not with the same in another order.

    Raises:
      UserError: the classes, the number of images, their names, labels or order differ; or the model has another head.
    """
    if not checkpoint.steps(workdir):
        return
    before = known_card(workdir)
    if before and before.num_classes != card.num_classes:
        changed = classes_difference(before.names, card.names)
        raise UserError(
            f"{workdir} holds a model of {before.num_classes} classes, the data have {card.num_classes}: {changed}",
            f"give another --workdir; there --config.model.weights={workdir} goes on from what this run has learnt",
        )
    names = data["classes"]
    if before and before.class_names and set(before.class_names) == set(names) and list(before.class_names) != names:
        raise UserError(  # whatever on_changed says: what the model has learnt of one it would take for another
            f"{workdir} holds a model of these classes in another order: {classes_difference(before.names, names)}",
            "bring them into that order, or give another --workdir",
        )
    if on_changed == "continue":
        return
    there = known_data(workdir)
    if there is None and before and before.class_names:  # a run of before either was written
        there = {**data, "classes": list(before.class_names)}
    if there is None:
        return
    if found := difference(there, data):
        raise UserError(
            f"{workdir} began with other data: {found}",
            "give another --workdir, or --config.train.on_changed_data=continue if this is meant",
        )


def known_card(workdir: Location) -> ModelCard | None:
    """The card of the run in `workdir`; None where neither model.json nor a checkpoint has it, and it is made anew."""
    with contextlib.suppress(UserError):
        return saved.read_card(workdir)
    return None


def known_data(workdir: Location) -> dict[str, Any] | None:
    """The fingerprint of the data that the run in `workdir` began with: of data.json, or else of its checkpoints."""
    with contextlib.suppress(UserError):
        return read_json(workdir / DATA)
    found = saved.in_checkpoint(workdir, "data")
    return found if isinstance(found, dict) else None


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """A config's keys that decide what a run computes, today's defaults for those that it lacks."""
    flat = config_module.flatten(json.loads(config_module.to_json(config_module.default())))
    flat |= config_module.flatten(config)
    return {key: value for key, value in flat.items() if not key.startswith(config_module.FREE)}


@contextlib.contextmanager
def lock(workdir: Path, enabled: bool = True) -> Iterator[None]:
    """Make `workdir` ours alone for a while. The kernel drops the lock with the process, however that ends.

    Raises:
      UserError: another process holds it, or the directory can't be written.
    """
    if not enabled:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    except OSError as error:
        raise UserError(f"{workdir} can't be written: {error.strerror}", "give another --workdir") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{workdir} is in use by {file.read(100).strip() or 'another run'}",
                "wait for it, or give another --workdir",
            ) from None
        except OSError:
            pass  # a file system without locks: better none than no run
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


@contextlib.contextmanager
def opened(workdir: Location, sends: bool = True) -> Iterator[WorkingCopy]:
    """Make `workdir` ours alone and, where it lies in a bucket, bring here what a run needs of it.

    Of the processes of a run one `sends`; the others read.

    Raises:
      UserError: another run holds it, or it can't be read or written.
      Stop: at its end it could not be written.
    """
    with contextlib.ExitStack() as stack:
        lease: Lease | None = None
        if isinstance(workdir, Path):
            stack.enter_context(lock(workdir, sends))
        elif sends:
            lease = stack.enter_context(Lease(workdir))
        copy = WorkingCopy(workdir, sends, lease)
        with storage.speaking_of(workdir, copy.path), copy:
            yield copy


def create(
    workdir: WorkingCopy, config: ConfigDict, card: ModelCard, data: dict[str, Any], enabled: bool = True
) -> None:
    """Write config, card and the fingerprint of the data into the directory, which is locked; each whole or not at all.

    Raises:
      UserError: meanwhile another run has begun here, it began with other data, or it can't be written.
    """
    if not enabled:
        return
    path = workdir.path
    check_config(path, config)
    check_data(path, card, data, config.train.on_changed_data)
    try:
        card.save(path)
        for name, text in ((DATA, json.dumps(data, indent=2) + "\n"), (CONFIG, config_module.to_json(config))):
            partial = path / (name + ".partial")
            partial.write_text(text)
            partial.replace(path / name)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}", "give another --workdir") from None


def final_record(workdir: Location) -> dict[str, Any] | None:
    """The last line of metrics.jsonl where the run is finished, else None."""
    last = (records(workdir) or [{}])[-1]
    return last if last.get("final") and is_finite(last.get("accuracy")) else None
