"""`hf:NAME[:CONFIG]`: image classification sets through Hugging Face's `datasets` (extra [hf])."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import numpy as np
import PIL.Image

from jaxsft import cli
from jaxsft.cli import UserError
from jaxsft.data import decode
from jaxsft.data.base import Options, Source, changed
from jaxsft.data.classes import in_order, numbered
from jaxsft.data.splits import canonical, partition, resolved, slices
from jaxsft.data.table import COLUMNS, plain

UNLABELLED = -1


@dataclasses.dataclass(frozen=True)
class Table(Source):
    """Rows of a `datasets.Dataset` whose images stay encoded until asked for."""

    rows: Any
    column: str
    numbers: np.ndarray  # int [N], of the rows
    labels: np.ndarray  # int32 [N]
    class_names: tuple[str, ...]
    upright: bool = True
    what: str = ""  # the data's name, for messages
    split: str = ""
    version: str = ""

    def __getitem__(self, index: int) -> PIL.Image.Image:
        return decode.read_rgb(self.content(index), self.upright)

    def content(self, index: int) -> bytes | str:
        """The file of an image, or where it lies. Raises decode.Unreadable."""
        cell = self.rows[int(self.numbers[index])][self.column] or {}
        content: bytes | str | None = cell.get("bytes") or cell.get("path")
        if not content:
            raise decode.Unreadable("no image")
        return content

    def encoded(self, index: int) -> bytes:
        content = self.content(index)
        return content if isinstance(content, bytes) else decode.content_of(content)

    def select(self, indices: np.ndarray) -> Table:
        return dataclasses.replace(self, numbers=self.numbers[indices], labels=self.labels[indices])

    def name(self, index: int) -> str:
        return f"row {self.numbers[index]} of split {self.split} of {self.what}"


def open_hub(name: str, split: str, options: Options) -> Table:
    """A split of a set of the Hub, of the local cache, or of a folder written by `save_to_disk`.

    A set without splits, or with 'train' alone, is divided by `options.eval_fraction` into 'train' and 'val'. Classes
    are those of a ClassLabel in its order, or the values of 'train' in a column that is called as in COLUMNS: text as
    `options.class_order` says, integers as numbers. -1, None and '' are no labels.

    Raises:
      UserError: `datasets` is not installed, no such set or split, no column of images or of classes, a label that is
        no class's or that 'train' lacks, rows without a label (with on_error 'raise').
    """
    what = f"hf:{name}"
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{what} needs the package 'datasets'", "install the extra: pip install 'jaxsft[hf]'")
    import datasets

    tables = load(name, what)
    trained = [table for part, table in tables.items() if canonical(part) == "train"] or [*tables.values()]
    column, label = columns(trained[0].features, what)
    feature = trained[0].features[label]
    if isinstance(feature, datasets.ClassLabel):
        class_names = tuple(feature.names)
    else:
        values = [value for table in trained for value in labels_of(table, label, what) if value is not None]
        class_names = in_order(values, options.class_order if "string" in feature.dtype else "numeric")
    own = next(iter(tables))
    if len(tables) == 1 and (not own or canonical(own) == "train"):
        chosen = partition(numbers_of(tables[own], label, class_names, what), options, what, own)
        tables = {part: tables[own].select(indices) for part, indices in chosen.items()}
    split = resolved(split, tables, what)
    parts = slices(split, {part: len(table) for part, table in tables.items()}, what)
    cut = [(part, tables[part].select(range(start, stop))) for part, start, stop in parts]
    if lacking := [part for part, table in cut if column not in table.column_names]:
        raise UserError(f"split {lacking[0]!r} of {what} has no column {column!r}", "name another split")
    images = [table.select_columns([column]).cast_column(column, datasets.Image(decode=False)) for _, table in cut]
    labels = np.concatenate([numbers_of(t, label, class_names, f"split {p!r} of {what}") for p, t in cut])
    labelled = np.flatnonzero(labels != UNLABELLED)
    if missing := len(labels) - len(labelled):
        message = f"{missing} of {len(labels)} rows of split {split!r} of {what} have no label"
        if options.on_error == "raise":
            raise UserError(message, "name another split, or leave them out with --config.data.on_error=skip")
        cli.warn(f"{message}: they are left out")
    rows = datasets.concatenate_datasets(images)
    version = f"{rows._fingerprint} {options.upright}"
    found = Table(rows, column, labelled, labels[labelled], class_names, options.upright, what, split, version)
    return changed(found, splits=tuple(tables))


def load(name: str, what: str) -> dict[str, Any]:
    """The `datasets.Dataset` of each split; '' is the name of one without splits.

    Raises:
      UserError: they can't be had.
    """
    import datasets

    where = cli.local_path(name)
    try:
        if any((where / file).exists() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(where))
        else:
            path, _, config = name.partition(":")
            loaded = datasets.load_dataset(os.path.expanduser(path), config or None)
    except Exception as error:  # the Hub's client raises many kinds; all mean that the set can't be had
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{what} can't be had: {reason}", "check its name and the network") from None
    tables = {str(k): v for k, v in loaded.items()} if isinstance(loaded, dict) else {"": loaded}
    if not tables:
        raise UserError(f"{what} holds no split", "write it again")
    return {part: table.with_format(None) for part, table in tables.items()}


def columns(features: Any, what: str) -> tuple[str, str]:
    """The names of the column of images and of the one of classes.

    Raises:
      UserError: there is none.
    """
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not classes:
        values = [name for name, feature in features.items() if isinstance(feature, datasets.Value)]
        called = {plain(name): name for name in values if re.search("int|string|bool", features[name].dtype)}
        classes = [called[known] for known in COLUMNS["label"] if known in called]
    if not images or not classes:
        raise UserError(
            f"{what} has no column of images and one of classes", f"it has {', '.join(features)}: cast two of them"
        )
    return images[0], "label" if "label" in classes else classes[0]


def labels_of(table: Any, label: str, what: str) -> list[str | None]:
    """The class of each row by name; None where it has none.

    Raises:
      UserError: a number that is no class's.
    """
    import datasets

    if label not in table.column_names:
        return [None] * len(table)
    feature = table.features[label]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    found: list[str | None] = []
    for value in table[label][:]:
        if value in (None, "", UNLABELLED):
            found.append(None)
        elif names is None:
            found.append(str(value))
        elif 0 <= value < len(names):
            found.append(names[value])
        else:
            raise UserError(f"{what} has the label {value}, which is none of its {len(names)} classes", "mend it")
    return found


def numbers_of(table: Any, label: str, class_names: tuple[str, ...], what: str) -> np.ndarray:
    """The number of each row's class: int32 [N], UNLABELLED where it has none.

    Raises:
      UserError: a number that is no class's, or a class that is not among `class_names`.
    """
    names = labels_of(table, label, what)
    numbers = np.full(len(names), UNLABELLED, np.int32)
    numbers[[name is not None for name in names]] = numbered((n for n in names if n is not None), class_names, what)
    return numbers
