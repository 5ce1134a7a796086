"""Images in files: `folder:PATH` in torchvision's ImageFolder layout, and `csv:FILE` with columns path and label."""

from __future__ import annotations

import csv
import dataclasses
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

from jaxsft.cli import UserError
from jaxsft.data import decode
from jaxsft.data.base import Options, Source
from jaxsft.data.index import index
from jaxsft.data.splits import EVAL_SPLITS, divided, shuffled, slices

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class Files(Source):
    """Images in files, decoded when asked for."""

    paths: tuple[str, ...]
    labels: np.ndarray  # int32 [N]
    class_names: tuple[str, ...]
    size: tuple[int, int] | None = None
    upright: bool = True
    bad: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, index: int) -> PIL.Image.Image:
        return decode.read_rgb(self.paths[index], self.upright)

    def take(self, indices: np.ndarray) -> Files:
        return dataclasses.replace(self, paths=tuple(self.paths[i] for i in indices), labels=self.labels[indices])

    def name(self, index: int) -> str:
        return self.paths[index]


class Row(NamedTuple):
    """One listed file."""

    path: str
    label: str


def open_folder(name: str, split: str, options: Options) -> Files:
    """A split of PATH/SPLIT/CLASS/*.jpg, or of one tree PATH/CLASS/*.jpg, divided by `options.eval_fraction`.

    The classes are the folders of 'train' by name, and the files of a class come in torchvision's order.

    Raises:
      UserError: no such folder or split, nothing in it, a class without images, a class that 'train' lacks, a broken
        image (with on_error 'raise').
    """
    root, what = Path(name).expanduser(), f"folder:{name}"
    if not name or not root.is_dir():
        raise UserError(f"{what} is no folder", "name one as folder:PATH")
    top = folders(root)
    if "train" in top or (top and set(top) <= set(EVAL_SPLITS)):
        groups = {part: classes_of(root / part, options, must_hold=part == "train") for part in top}
    else:
        rows = classes_of(root, options, must_hold=True)
        groups = divided_rows(rows, options)
    if not any(groups.values()):
        raise UserError(f"{what} holds no images", "it must hold train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg")
    return open_rows(what, root, groups, split, options)


def open_csv(name: str, split: str, options: Options) -> Files:
    """The images listed in a CSV file: path (from the file's folder), label and, if wanted, split.

    A first line that says `path,label` or `path,label,split` names the columns. Without a column of splits the rows are
    divided by `options.eval_fraction`.

    Raises:
      UserError: no such file, a line that is short, and as `open_folder`.
    """
    file, what = Path(name).expanduser(), f"csv:{name}"
    try:
        lines = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{what} can't be read: {getattr(error, 'strerror', None) or error}", "name a CSV file"
        ) from None
    header = ["path", "label", "split"]
    numbered = [(number, [cell.strip() for cell in line]) for number, line in enumerate(lines, 1) if any(line)]
    if numbered and [cell.lower() for cell in numbered[0][1]] in (header, header[:2]):
        del numbered[0]
    groups: dict[str, list[Row]] = {}
    for number, cells in numbered:
        if not 2 <= len(cells) <= 3 or not all(cells):
            raise UserError(f"line {number} of {file} is not path,label[,split]", "mend it")
        part = cells[2] if len(cells) == 3 else ""
        groups.setdefault(part, []).append(Row(os.path.join(file.parent, cells[0]), cells[1]))
    if not groups:
        raise UserError(f"{file} lists no images", "write lines path,label")
    if "" in groups:
        if len(groups) > 1:
            raise UserError(f"some lines of {file} name a split and others do not", "name one in all or in none")
        groups = divided_rows(groups[""], options)
    return open_rows(what, file, groups, split, options)


def open_rows(what: str, root: Path, groups: dict[str, list[Row]], split: str, options: Options) -> Files:
    """The files of `split`, checked by their headers; the classes are those of 'train', where there is one.

    Numbers in slices such as 'train[:500]' count in a fixed random order, for files lie sorted by class.
    """
    parts = slices(split, {part: len(rows) for part, rows in groups.items()}, what)
    known = groups.get("train") or [row for rows in groups.values() for row in rows]
    class_names = in_order({row.label for row in known})
    rows: list[Row] = []
    for part, start, stop in parts:
        for row in groups[part]:
            if row.label not in class_names:
                raise UserError(
                    f"split {part!r} of {what} has the class {row.label!r}, which 'train' lacks",
                    "remove it or add training images of it",
                )
        rows += [groups[part][i] for i in np.sort(shuffled(np.arange(len(groups[part])), 0, 0)[start:stop])]
    known_of = index(root, split, [row.path for row in rows], options.upright)
    bad = tuple((row.path, error) for row, error in zip(rows, known_of.errors, strict=True) if error)
    if bad and options.on_error == "raise":
        raise broken(*bad[0], more=len(bad) - 1)
    good = np.array([not error for error in known_of.errors], bool)
    sizes = known_of.sizes[good]
    one_size = len(sizes) > 0 and bool((sizes == sizes[0]).all())
    numbers = {label: number for number, label in enumerate(class_names)}
    return Files(
        tuple(row.path for row, is_good in zip(rows, good, strict=True) if is_good),
        np.array([numbers[row.label] for row in rows], np.int32)[good],
        class_names,
        (int(sizes[0, 0]), int(sizes[0, 1])) if one_size else None,
        options.upright,
        bad,
    )


def broken(file: str, reason: str, more: int = 0) -> UserError:
    """The error about a broken image."""
    others = f" (and {more} more)" if more else ""
    return UserError(f"{file}: {reason}{others}", "remove it, or leave such files out with --config.data.on_error=skip")


def divided_rows(rows: list[Row], options: Options) -> dict[str, list[Row]]:
    """Rows without splits as 'train' and 'val'."""
    _, labels = np.unique([row.label for row in rows], return_inverse=True)
    train, held_out = divided(labels, options.eval_fraction, options.seed)
    return {"train": [rows[i] for i in train], "val": [rows[i] for i in held_out]}


def in_order(labels: set[str]) -> tuple[str, ...]:
    """Names of classes in their order: as numbers where all are, else as text."""
    return tuple(sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels))


def classes_of(root: Path, options: Options, must_hold: bool) -> list[Row]:
    """The image files of every class folder in `root`.

    Raises:
      UserError: a folder that can't be read or, where a class `must_hold` images, one without (with on_error 'raise').
    """
    rows: list[Row] = []
    for label in folders(root):
        found = [Row(path, label) for path in images(root / label, options)]
        if not found and must_hold:
            if options.on_error == "raise":
                raise UserError(f"{root / label} holds no images ({', '.join(EXTENSIONS)})", "remove the empty class")
            warn(f"{root / label} holds no images: the class is left out")
        rows += found
    return rows


def folders(path: Path) -> list[str]:
    """The names of the folders in `path`, sorted, without hidden ones."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise unreadable(path, error) from None


def images(root: Path, options: Options) -> list[str]:
    """The image files under `root`, links followed, in the order of torchvision's `make_dataset`.

    A link that leads back to a folder it lies in is not followed. Hidden files are no images (macOS writes ._x.jpg).
    """
    found: list[tuple[str, list[str]]] = []
    above = (os.path.realpath(root.parent), *map(str, Path(os.path.realpath(root)).parents))
    walk(str(root), above, found, options)
    return [os.path.join(folder, name) for folder, names in sorted(found) for name in sorted(names)]


def walk(folder: str, above: tuple[str, ...], found: list[tuple[str, list[str]]], options: Options) -> None:
    """Add `folder` and those below it to `found`, each with its image files."""
    real = os.path.realpath(folder)
    if real in above:
        warn(f"{folder} links back to {real}: not followed")
        return
    try:
        with os.scandir(folder) as scanned:
            entries = [entry for entry in scanned if not entry.name.startswith(".")]
    except OSError as error:
        if options.on_error == "raise":
            raise unreadable(folder, error) from None
        warn(f"{folder} can't be read: {error.strerror}: left out")
        return
    below = [entry for entry in entries if entry.is_dir()]
    found.append((folder, [e.name for e in entries if e not in below and e.name.lower().endswith(EXTENSIONS)]))
    for entry in below:
        walk(entry.path, (*above, real), found, options)


def unreadable(path: Path | str, error: OSError) -> UserError:
    """The error about a folder."""
    return UserError(f"{path} can't be read: {error.strerror}", "make it readable or leave it out")


def warn(message: str) -> None:
    """One line about what was passed over."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
