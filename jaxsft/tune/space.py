"""The space of a search: which keys of the config it changes, and what it may give them.

SPACE = {
    "optim.lr": ("log", 1e-3, 1e-1),              # evenly over the logarithm
    "train.mixup": ("float", 0, 0.4),
    "optim.step_epochs": ("int", 5, 30),
    "optim.name": ("choice", ["sgd", "adamw"]),
}
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxsft import config as config_module
from jaxsft.cli import UserError, local_path, nearest
from jaxsft.config import as_tuple, kinds, wanted
from jaxsft.flags import as_text
from jaxsft.keys import KEYS
from jaxsft.recipes import run_file

RANGES, CHOICE = ("log", "float", "int"), "choice"
NAME = "SPACE"
# What decides which images there are: all trials share them, divided once.
OF_ALL = ("data.source", "data.data_dir", "data.train_split", "data.eval_split", "data.eval_fraction", "data.fraction",
          "data.per_class", "data.class_order", "data.on_error", "data.exif_orientation", "data.check_overlap",
          "data.resident_mb", "data.label_delimiter", "model.classes")  # fmt: skip


class Dimension(NamedTuple):
    """One key of the space: 'log', 'float' or 'int' from `values[0]` to `values[1]`, or a 'choice' of `values`."""

    key: str
    kind: str
    values: tuple[Any, ...]

    def stored(self, value: Any) -> Any:
        """A value of a choice as Optuna keeps it: tuples as text."""
        return as_text(value) if isinstance(value, tuple) else value

    def meant(self, stored: Any) -> Any:
        """The value of the config that Optuna's means."""
        if self.kind == CHOICE:
            return next(value for value in self.values if self.stored(value) == stored)
        return float(stored) if kinds()[self.key][0] is float else int(stored)

    def record(self) -> list[Any]:
        """As JSON has it."""
        return [self.kind, *self.values]


def load(file: str, config: ConfigDict) -> tuple[Dimension, ...]:
    """The space that a Python file defines.

    Args:
      file: its path.
      config: that the trials start from; each single end and choice must be possible in it.

    Raises:
      UserError: there is no such file, it can't be run, or its SPACE is none.
    """
    path = local_path(file)
    found = getattr(run_file(path, "space", "name the file that defines SPACE"), NAME, None)
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"the space file {path} defines no {NAME}", "write SPACE = {'optim.lr': ('log', 1e-3, 1e-1)}")
    return tuple(dimension(f"{NAME} of {path}", key, entry) for key, entry in found.items())


def dimension(where: str, key: Any, entry: Any) -> Dimension:
    """An entry of SPACE, checked. Raises UserError."""
    if key not in kinds():
        raise UserError(f"{where} has the key {key!r}, which the config has not", nearest(str(key), sorted(kinds())))
    if key in OF_ALL:
        raise UserError(f"{where} has the key {key!r}", "leave it out: all trials are of the same images")
    if not isinstance(entry, list | tuple) or not entry or not isinstance(entry[0], str):
        raise UserError(f"{where}: {key} is {entry!r}", "write it as ('log', 1e-3, 1e-1) or ('choice', [...])")
    kind, *rest = entry
    if kind == CHOICE:
        if len(rest) != 1 or not isinstance(rest[0], list | tuple) or not rest[0]:
            raise UserError(f"{where}: {key} is {entry!r}", "write it as ('choice', [one, another])")
        values = tuple(as_tuple(value) for value in rest[0])
    elif kind in RANGES:
        values = ends(f"{where}: {key} is {entry!r}", key, kind, rest)
    else:
        raise UserError(f"{where}: {key} is {entry!r}", nearest(kind, [*RANGES, CHOICE]))
    for value in values:
        check_value(where, key, value)
    return Dimension(key, kind, values)


def ends(what: str, key: str, kind: str, rest: list[Any]) -> tuple[Any, Any]:
    """The two ends of a range. Raises UserError, of `what`."""
    type_ = kinds()[key][0]
    if type_ not in (int, float):
        raise UserError(what, f"it must be ('choice', [...]): {key} is no number")
    if len(rest) != 2 or not all(type(end) in (int, float) and abs(end) < inf for end in rest):
        raise UserError(what, f"write it as ('{kind}', lowest, highest)")
    low, high = rest
    if not low < high:
        raise UserError(what, "the lowest must be less than the highest")
    if kind == "log" and low <= 0:
        raise UserError(what, "the lowest of 'log' must be above 0")
    if (type_ is int or kind == "int") and not (float(low).is_integer() and float(high).is_integer()):
        raise UserError(what, "both ends must be whole numbers")
    if type_ is int and kind == "float":
        raise UserError(what, f"write 'int': {key} is a whole number")
    return (float(low), float(high)) if type_ is float and kind != "int" else (int(low), int(high))


def check_value(where: str, key: str, value: Any) -> None:
    """Raise a UserError where a config can't have this value under this key."""
    type_, may_be_none = kinds()[key]
    fits = may_be_none if value is None else isinstance(value, (int, float) if type_ is float else type_)
    allowed = next(row.allowed for row in KEYS if row.name == key)
    if not fits or (isinstance(value, bool) and type_ is not bool) or not allowed.admits(value):
        raise UserError(f"{where}: {key} has {value!r}", f"it must be {wanted(key)}")
    for name in allowed.unknown(value):
        raise UserError(f"{where}: {key} has {name!r}", nearest(name, allowed.known()))


def config_of(config: ConfigDict, dimensions: tuple[Dimension, ...], params: Mapping[str, Any]) -> ConfigDict:
    """The config of a trial: that of the search with Optuna's `params`."""
    own = config.copy_and_resolve_references()
    for one in dimensions:
        config_module.put(own, one.key, one.meant(params[one.key]))
    return own
