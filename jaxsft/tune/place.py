"""The folder of a search: what it is for, which the next command compares itself with, and its lock."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxsft import config as config_module
from jaxsft import storage
from jaxsft.cli import UserError
from jaxsft.output import to_json
from jaxsft.run import workdir as workdir_module
from jaxsft.run.saved import read_json
from jaxsft.run.working_copy import LOCK
from jaxsft.storage import Location

RECORD = "search.json"


def purpose(config: ConfigDict, kind: str, **options: Any) -> dict[str, Any]:
    """What a folder is for: the kind of search, its options, and the config that it starts from; as JSON has it."""
    return {"kind": kind, **options, "config": json.loads(config_module.to_json(config))}


def check(workdir: Location, wanted: dict[str, Any]) -> None:
    """Find out before any work whether a folder can be used; leaves nothing behind.

    Raises:
      UserError: it holds something else, or a search for something else, or can't be written.
    """
    existing = workdir.absolute() if isinstance(workdir, Path) else workdir
    while isinstance(existing, Path) and not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        storage.try_to_write(existing)
        if not (workdir / RECORD).exists():
            if workdir.exists() and any(not path.name.startswith(LOCK) for path in workdir.iterdir()):
                raise UserError(f"{workdir} is not empty and holds no search", "give another --workdir")
            return
    except OSError as error:
        raise UserError(f"{workdir} can't be written: {error.strerror}", "give another --workdir") from None
    there, here = (settings(record) for record in (read_json(workdir / RECORD), json.loads(to_json(wanted))))
    differing = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if differing:
        listed = ", ".join(f"{key} ({there.get(key)!r} there, {here.get(key)!r} here)" for key in differing)
        raise UserError(f"{workdir} holds another search: {listed}", "give another --workdir")


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """What distinguishes searches: the options, and the keys of the config that decide what is computed."""
    options = {key: value for key, value in record.items() if key != "config"}
    return {**options, **workdir_module.settings(record.get("config") or {})}


def begin(workdir: Location, wanted: dict[str, Any]) -> None:
    """Write down what a folder is for. Raises UserError as `check` does."""
    check(workdir, wanted)
    try:
        if isinstance(workdir, Path):
            workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir} can't be written: {error.strerror}", "give another --workdir") from None
    storage.write_file(workdir / RECORD, to_json(wanted).encode())


@contextlib.contextmanager
def ours(workdir: Location, wanted: dict[str, Any]) -> Iterator[None]:
    """Make a folder ours alone for a while, and write down what it is for; of one in a bucket each run in it is locked.

    Raises:
      UserError: as `check`, or another process has it.
    """
    with workdir_module.lock(workdir) if isinstance(workdir, Path) else contextlib.nullcontext():
        begin(workdir, wanted)
        yield
