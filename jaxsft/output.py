"""What commands write where --json and --out say: into a file, a bucket, or on stdout."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TextIO

from jaxsft import storage
from jaxsft.cli import Stop, write_output
from jaxsft.storage import Location

STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def json_to(file: str) -> Callable[[Any], None]:
    """Argparse's `type` for --json, whose default is '': a function that writes a value there as JSON, once.

    For `-` and /dev/stdout it is stdout, and until `run` ends all that is printed goes to stderr, so that a program
    can read the JSON. '' is nowhere.

    Raises:
      UserError: no file can be made there; found now, not after the work.
    """
    if not file:
        return lambda value: None
    if file in STDOUT:
        out, sys.stdout = sys.stdout, sys.stderr
        return lambda value: write_output(out, to_json(value))
    path = storage.location(file)
    storage.check_writable(path)
    return functools.partial(write_json, path)


def text_to(file: str, whole: bool = False) -> Callable[[], AbstractContextManager[Callable[[str], None]]]:
    """Where text too long for memory goes: a function that opens the place, for a `with` that gives how to write there.

    A file or an object appears when the `with` is left without an error, in the place of what was there. `-` and
    /dev/stdout are written to as the text comes or, with `whole`, at the end; what else is printed then goes to stderr.

    Raises:
      UserError: no file can be made there; found now, not after the work.
    """
    if not file:
        return lambda: contextlib.nullcontext(lambda text: None)
    if file in STDOUT:
        out, sys.stdout = sys.stdout, sys.stderr
        write = functools.partial(write_output, out)
        return lambda: at_the_end(lambda kept: copy(kept, write)) if whole else contextlib.nullcontext(write)
    path = storage.location(file)
    storage.check_writable(path)
    return lambda: at_the_end(functools.partial(write_copy, path))


@contextlib.contextmanager
def at_the_end(deliver: Callable[[TextIO], None]) -> Iterator[Callable[[str], None]]:
    """How to write text that is kept, on the disk, until it is whole and `deliver` gets it, as a file from its start.

    Raises:
      Stop: there is no room for it.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace", newline="") as kept:

        def write(text: str) -> None:
            try:
                kept.write(text)
            except OSError as error:
                raise Stop(f"the output can't be kept: {error.strerror}", "make room, or set TMPDIR") from None

        yield write
        write("")
        kept.seek(0)
        deliver(kept)


def copy(file: TextIO, write: Callable[[str], Any]) -> None:
    """Write all that is in a file."""
    while part := file.read(2**20):
        write(part)


def write_copy(path: Location, file: TextIO) -> None:
    """Let `path` be what is in a file: as `storage.write_file`, for what is too long for memory. Raises UserError."""
    if storage.is_stream(path):
        copy(file, lambda part: storage.write_file(path, part.encode()))
        return
    with (
        storage.writing(path) as target,
        storage.replacing(target) as partial,
        partial.open("w", encoding="utf-8", newline="") as out,
    ):
        copy(file, out.write)


def write_json(path: Location, value: Any) -> None:
    """Write `value` as JSON; see `storage.write_file`."""
    storage.write_file(path, to_json(value).encode())


def to_json(value: Any) -> str:
    """`value` as JSON text; NaN and infinity, which JSON has not, as null."""
    return json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """`value` with None for every float that is NaN or infinite."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
