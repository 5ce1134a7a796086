"""Images in files, decoded when asked for, whatever lists them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image

from jaxsft.cli import UserError
from jaxsft.data import decode
from jaxsft.data.base import Options, Source, changed
from jaxsft.data.classes import in_order, multi_hot, numbered
from jaxsft.data.index import index
from jaxsft.data.splits import canonical, partition, resolved, shuffled, slices
from jaxsft.storage import Location


@dataclasses.dataclass(frozen=True)
class Files(Source):
    """Images in files."""

    paths: tuple[str, ...]
    labels: np.ndarray  # int32 [N] or uint8 [N, K]
    class_names: tuple[str, ...]
    size: tuple[int, int] | None = None
    upright: bool = True
    bad: tuple[tuple[str, str], ...] = ()
    split: str = ""
    listing: str = ""
    version: str = ""
    scattered = True  # they lie sorted by class

    def __getitem__(self, index: int) -> PIL.Image.Image:
        return decode.read_rgb(self.paths[index], self.upright)

    def encoded(self, index: int) -> bytes:
        return decode.content_of(self.paths[index])

    def select(self, indices: np.ndarray) -> Files:
        return dataclasses.replace(self, paths=tuple(self.paths[i] for i in indices), labels=self.labels[indices])

    def name(self, index: int) -> str:
        return self.paths[index]


class Row(NamedTuple):
    """One listed file."""

    path: str
    label: str | tuple[str, ...]  # the name of its class; of any number of them, in their order
    key: str  # the path from where it is listed: the same wherever the data lies


def open_rows(
    what: str,
    root: Location,
    groups: Mapping[str, Sequence[Row]],
    split: str,
    options: Options,
    class_names: tuple[str, ...] = (),
) -> Files:
    """The files of `split`, each decoded once; the classes, if not given, are those of 'train', where there is one.

    Numbers in slices such as 'train[:500]' count in a fixed random order, for files lie sorted by class.

    Args:
      what: the data's name, for messages.
      root: the folder or file that lists them.
      groups: the files of each split.
      split: as `slices` takes it.
      options: of the config.
      class_names: of all there are; (): those that training images have.

    Raises:
      UserError: no such split, a class that 'train' lacks, a broken image (with on_error 'raise').
    """
    split = resolved(split, groups, what)
    parts = slices(split, {part: len(rows) for part, rows in groups.items()}, what)
    trained = [rows for part, rows in groups.items() if canonical(part) == "train" and rows]
    known = itertools.chain.from_iterable(trained or groups.values())
    class_names = class_names or in_order(itertools.chain.from_iterable(map(names_of, known)), options.class_order)
    rows: list[Row] = []
    found: list[np.ndarray] = []
    for part, start, stop in parts:
        numbers = labels_of(groups[part], class_names, f"split {part!r} of {what}")
        chosen = np.sort(shuffled(np.arange(len(numbers)), 0, 0)[start:stop])
        rows += [groups[part][i] for i in chosen]
        found.append(numbers[chosen])
    labels = np.concatenate(found)
    known_of = index(root, split, [row.path for row in rows], options.upright)
    bad = tuple((row.path, error) for row, error in zip(rows, known_of.errors, strict=True) if error)
    if bad and options.on_error == "raise":
        raise broken(*bad[0], more=len(bad) - 1)
    good = np.array([not error for error in known_of.errors], bool)
    sizes = known_of.sizes[good]
    one_size = len(sizes) > 0 and bool((sizes == sizes[0]).all())
    files = Files(
        tuple(row.path for row, is_good in zip(rows, good, strict=True) if is_good),
        labels[good],
        class_names,
        (int(sizes[0, 0]), int(sizes[0, 1])) if one_size else None,
        options.upright,
        bad,
        split,
        listing(rows),
        f"{known_of.version} {options.upright}",
    )
    return changed(files, splits=tuple(groups))


def names_of(row: Row) -> tuple[str, ...]:
    """The names of its classes, one or several."""
    return (row.label,) if isinstance(row.label, str) else row.label


def labels_of(rows: Sequence[Row], class_names: Sequence[str], what: str) -> np.ndarray:
    """The labels of files, int32 [N], or of files with any number of them each uint8 [N, K]. Raises UserError."""
    if rows and not isinstance(rows[0].label, str):
        return multi_hot(map(names_of, rows), class_names, what)
    return numbered((name for row in rows for name in names_of(row)), class_names, what)


def listing(rows: Iterable[Row]) -> str:
    """sha256 of the keys and labels in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.key}\0{row.label}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def with_eval_split(groups: dict[str, list[Row]], options: Options, what: str) -> dict[str, list[Row]]:
    """`groups`; one alone, without a name ('') or the one to train on, as the splits that `partition` makes of it."""
    own = next(iter(groups))
    if len(groups) > 1 or (own and canonical(own) != "train"):
        return groups
    class_names = in_order(itertools.chain.from_iterable(map(names_of, groups[own])), "text")
    parts = partition(labels_of(groups[own], class_names, what), options, what, own)
    return {part: [groups[own][i] for i in indices] for part, indices in parts.items()}


def broken(file: str, reason: str, more: int = 0) -> UserError:
    """The error about a broken image."""
    others = f" (and {more} more)" if more else ""
    return UserError(f"{file}: {reason}{others}", "remove it, or leave such files out with --config.data.on_error=skip")
