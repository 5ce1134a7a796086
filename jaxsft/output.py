"""JSON that commands write where --json says: into a file, a bucket, or on stdout."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

from jaxsft import storage
from jaxsft.cli import write_output
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
