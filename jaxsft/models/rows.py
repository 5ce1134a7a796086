"""A head whose classes are changed by name: rows of the old one, and fresh ones for what is new.

`model.classes` names the outputs in their order. An entry 'old=new' gives the class `old` of the weights a new name;
one that the weights know keeps its row; any other is a new class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsft.cli import UserError, nearest

SHOWN = 5  # names of a kind, in a line


def renamed(entry: str) -> tuple[str, str]:
    """(what the weights call it, what it is to be called) of an entry of model.classes."""
    old, is_renamed, new = entry.partition("=")
    return (old, new) if is_renamed else (entry, entry)


def names_of(entries: Sequence[str]) -> tuple[str, ...]:
    """The names of the outputs, in their order."""
    return tuple(renamed(entry)[1] for entry in entries)


def rows_of(entries: Sequence[str], old: Sequence[str] | None, source: str) -> tuple[list[int], str]:
    """For each output its row in the old head, -1 where it is new; and a line that says what was done.

    Args:
      entries: model.classes.
      old: names of the weights' classes, in the order of its outputs; None: they are not known.
      source: what the weights are called.

    Raises:
      UserError: they are not known, or a class that is to be renamed is not among them.
    """
    if not old:
        raise UserError(
            f"config.model.classes goes by names, and the classes of {source} have none",
            "leave it out, or give weights that have such: a run of this program",
        )
    places, pairs = {name: place for place, name in enumerate(old)}, [renamed(entry) for entry in entries]
    for entry, (before, after) in zip(entries, pairs, strict=True):
        if before != after and before not in places:
            raise UserError(
                f"config.model.classes has {entry!r}, and {source} knows no class {before!r}", nearest(before, [*old])
            )
    rows = [places.get(before, -1) for before, _ in pairs]
    new = [after for (_, after), row in zip(pairs, rows, strict=True) if row < 0]
    dropped = [name for place, name in enumerate(old) if place not in rows]
    changed = [f"{before} to {after}" for before, after in pairs if before != after]
    parts = [f"{len(rows) - len(new)} rows kept"]
    parts += [f"{len(names)} {what} ({listed(names)})" for what, names in
              (("new", new), ("dropped", dropped), ("renamed", changed)) if names]  # fmt: skip
    return rows, f"head: {', '.join(parts)}"


def listed(names: Sequence[str]) -> str:
    """Some of `names`, with commas between."""
    return ", ".join([*names[:SHOWN], *(["..."] if len(names) > SHOWN else [])])


def with_rows(fresh: Any, old: Any, rows: Sequence[int]) -> Any:
    """The head `fresh`, of len(rows) outputs, in which those with a row have the weights that the `old` one has there.

    Both are trees of arrays [..., outputs], such as {"kernel": [C, K], "bias": [K]}.
    """
    known = [place for place, row in enumerate(rows) if row >= 0]
    taken = [rows[place] for place in known]

    def put(new: jax.Array, before: jax.Array) -> jax.Array:
        return jnp.asarray(new).at[..., jnp.asarray(known, int)].set(jnp.asarray(before)[..., jnp.asarray(taken, int)])

    return jax.tree.map(put, fresh, old)
