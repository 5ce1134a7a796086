"""The config of a run: its keys with the values that they have, and what is wrong with these.

A file in configs/ defines `get_config(variant)`, which starts from `default()` and changes what its task needs; the
command line overrides single keys (`--config.optim.lr=0.02`). `check` finds what is wrong before any work is done.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxsft.cli import UserError, nearest
from jaxsft.conflicts import conflicts
from jaxsft.keys import KEYS

# Keys by which a resumed run may differ from what it was: they change how it is computed, not what. When it is
# evaluated is one; what it is evaluated on (data.eval_split) is none: the lines of one log must be comparable.
FREE = ("eval.", "checkpoint.", "parallel.backend", "parallel.timeout_seconds", "data.data_dir", "data.cache",
        "data.workers", "data.on_error", "data.check_overlap", "train.on_nan", "train.on_changed_data",
        "train.log_every_steps", "train.steps_per_call")  # fmt: skip
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text, '' for none", tuple: "a tuple"}


def default() -> ConfigDict:
    """Every key with its default."""
    config = ConfigDict()
    for key in KEYS:
        section = key.name.rpartition(".")[0]
        if section and section not in config:
            config[section] = ConfigDict()
        put(config, key.name, placeholder(key.kind) if key.default is None else key.default)
    return config


@functools.cache
def kinds() -> dict[str, tuple[type, bool]]:
    """For every key the type of its values, and whether it may be None instead; by name, as a ConfigDict lists them."""
    return {
        key.name: (key.kind if key.default is None else type(key.default), key.default is None)
        for key in sorted(KEYS, key=lambda key: key.name)
    }


def wanted(name: str) -> str:
    """What the value of a key must be, as in `it must be a number, above 0`."""
    must = next(key.allowed.text for key in KEYS if key.name == name)
    type_, _ = kinds()[name]
    return ", ".join(filter(None, (KINDS[type_] if type_ in (bool, int, float) or not must else "", must)))


def check_keys(config: ConfigDict) -> None:
    """Raise a UserError where the keys of a config are not those of `default`, or the type of a value is not.

    Raises:
      UserError: a key that is missing, or not known, or holds something else.
    """
    known, given = kinds(), flatten(config.to_dict())
    for name in [*given, *known]:
        if name not in known:
            raise UserError(f"the config has a key {name!r} that means nothing", nearest(name, sorted(known)))
        if name not in given:
            raise UserError(f"the config has no key {name!r}", "let it start from jaxsft.config.default()")
        type_, may_be_none = known[name]
        value = given[name]
        fits = may_be_none if value is None else isinstance(value, (int, float) if type_ is float else type_)
        if not fits or (isinstance(value, bool) and type_ is not bool):
            raise UserError(f"config.{name} is {value!r}", f"it must be {wanted(name)}")


def check(config: ConfigDict) -> None:
    """Raise a UserError for the first setting that can't be meant, or does not go with another.

    Raises:
      UserError: a key, its value, what it must be.
    """
    check_keys(config)
    for key in KEYS:
        value = get(config, key.name)
        if not key.allowed.admits(value):
            raise UserError(f"config.{key.name} is {value!r}", f"it must be {key.allowed.text}")
        for name in key.allowed.unknown(value):
            verb = "has" if isinstance(value, tuple) else "is"
            raise UserError(f"config.{key.name} {verb} {name!r}", nearest(name, key.allowed.known()))
    for is_so, what, what_to_do in conflicts(config):
        if is_so:
            raise UserError(what, what_to_do)


def get(config: ConfigDict, key: str) -> Any:
    """The value under a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def put(config: ConfigDict, key: str, value: Any) -> None:
    """Set the value under a dotted key.

    Raises:
      KeyError, TypeError: a locked config has no such key, or a value of another type there.
    """
    section, _, leaf = key.rpartition(".")
    (get(config, section) if section else config)[leaf] = value


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} as {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def to_json(config: ConfigDict) -> str:
    """The config as JSON text; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """`to_json` backwards, over today's defaults.

    Raises:
      ValueError: not JSON.
      KeyError, TypeError: a key that does not exist today, a value of another type.
    """
    config = default().lock()
    for key, value in flatten(json.loads(text)).items():
        put(config, key, as_tuple(value) if isinstance(value, list) else value)
    return config


def as_tuple(value: Any) -> Any:
    """Lists, also nested, as tuples."""
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value
