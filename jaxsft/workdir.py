"""A run's directory: config.json, model.json, metrics.jsonl, checkpoints/, events.* and its lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxsft import config as config_module
from jaxsft import runs
from jaxsft.cli import UserError
from jaxsft.initial import make_model
from jaxsft.log import records
from jaxsft.models.resnet import ResNet
from jaxsft.runs import CONFIG, read_json
from jaxsft.weights import ModelCard

LOCK = "lock"


def check(workdir: Path, config: ConfigDict) -> None:
    """Find out before any work whether `config` can run in `workdir`; leaves nothing behind.

    Raises:
      UserError: the directory holds a run of another config, a run that is going on, something else, or can't be
        written.
    """
    existing = workdir.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        # Tried, not asked: os.access says yes to root, and knows nothing of quotas.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{workdir} can't be written: {error.strerror}", "give another --workdir") from None
    check_config(workdir, config)
    if (workdir / LOCK).exists():
        with lock(workdir):
            pass


def check_config(workdir: Path, config: ConfigDict) -> None:
    """Raise a UserError where `workdir` holds a run of another config, or something that is no run."""
    if not (workdir / CONFIG).exists():
        if workdir.exists() and any(path.name != LOCK for path in workdir.iterdir()):
            raise UserError(f"{workdir} is not empty and holds no run", "give another --workdir")
        return
    there = settings(read_json(workdir / CONFIG))
    here = settings(json.loads(config_module.to_json(config)))
    differing = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if differing:
        listed = ", ".join(f"{key} ({there.get(key)!r} there, {here.get(key)!r} here)" for key in differing)
        raise UserError(f"{workdir} holds a run of another config: {listed}", "give another --workdir")


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


def create(workdir: Path, config: ConfigDict, card: ModelCard, enabled: bool = True) -> None:
    """Write config and card into the directory, which is locked; each appears whole or not at all.

    Raises:
      UserError: meanwhile another run has begun here, or it can't be written.
    """
    if not enabled:
        return
    check_config(workdir, config)
    try:
        card.save(workdir)
        partial = workdir / (CONFIG + ".partial")
        partial.write_text(config_module.to_json(config))
        partial.replace(workdir / CONFIG)
    except OSError as error:
        raise UserError(f"{workdir} can't be written: {error.strerror}", "give another --workdir") from None


def final_record(workdir: Path) -> dict[str, Any] | None:
    """The last line of metrics.jsonl where the run is finished, else None."""
    lines = records(workdir)
    return lines[-1] if lines and lines[-1].get("final") else None


class Run(NamedTuple):
    """A run read back: what evaluate, predict and export work with."""

    config: ConfigDict
    card: ModelCard
    model: ResNet
    variables: dict[str, Any]
    step: int


def load_run(workdir: Path, which: str = "last") -> Run:
    """A run at its newest intact checkpoint ('last'), its 'best', or the one of a step, on this process's first device.

    Raises:
      UserError: as `runs.read`.
    """
    saved = runs.read(workdir, which)
    model = make_model(saved.config, saved.card.num_classes)
    return Run(saved.config, saved.card, model, jax.device_put(saved.variables, jax.local_devices()[0]), saved.step)
