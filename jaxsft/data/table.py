"""`csv:FILE`: images listed in a table, with columns of paths, of labels, one or several, and if wanted of splits."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence

from jaxsft import storage
from jaxsft.cli import UserError
from jaxsft.data import listing
from jaxsft.data.base import Options
from jaxsft.data.classes import in_order
from jaxsft.data.files import Files, Row, names_of, open_rows, with_eval_split
from jaxsft.data.folder import EXTENSIONS, warn_once
from jaxsft.data.splits import check_spellings
from jaxsft.storage import Location

DELIMITERS = ",;\t"
# What columns are called, without case, spaces, '_' and '-'; of several in a table the first named here counts.
COLUMNS = {
    "path": ("path", "filepath", "imagepath", "imgpath", "file", "filename", "imagefile", "imagefilename", "imgfile",
             "imagename", "imgname", "image", "img", "imageid"),
    "label": ("label", "labels", "class", "target", "category", "classname", "labelname", "categoryname"),
    "split": ("split", "set", "subset", "partition"),
}  # fmt: skip
BINARY = {"0": False, "1": True, "0.0": False, "1.0": True}  # in a column that stands for a class


def open_csv(name: str, split: str, options: Options) -> Files:
    """The images listed in a CSV file: path (from the file's folder), label and, if wanted, split.

    Its first line may name the COLUMNS, in any order and among others; cells are separated by one of DELIMITERS.
    Backslashes in paths separate folders where no file has them in its name. Without splits the rows are divided by
    `options.eval_fraction`.

    An image has any number of labels, none too, where `options.label_delimiter` separates them in their cell; and in a
    table that has no column of labels and instead a column for each class, 0 or 1 in every line. It then stands in one
    line alone.

    Raises:
      UserError: no such file, a first line that neither names columns nor a picture, a line that does not fit, an image
        with several labels that comes twice, no label at all, and as `open_rows`.
    """
    file, what = storage.location(name), f"csv:{name}"
    listing.read(file.parent)
    numbered = read_table(file, what)
    if not numbered:
        raise UserError(f"{file} lists no images", "write lines path,label")
    places, width = columns(numbered[0][1]), len(numbered[0][1])
    classes = class_columns([cells for _, cells in numbered])
    several = bool(classes or options.label_delimiter)
    if has_header := is_header(places) or bool(classes):
        check_columns(file, numbered[0][1], places, classes)
        del numbered[0]
    else:
        places = {"path": 0, "label": 1, "split": 2}
    groups: dict[str, list[Row]] = {}
    seen: dict[str, int] = {}
    for number, cells in numbered:
        if has_header and len(cells) != width:
            raise UserError(f"line {number} of {file} has {len(cells)} cells, its header {width}", "mend it")
        path, label, part = (cells[places[k]] if places.get(k, width) < len(cells) else "" for k in COLUMNS)
        filled = cells[:1] + cells[2:] if several else cells
        is_odd = not has_header and (len(cells) not in (2, 3) or not all(filled))
        if not path or not (label or several) or "\0" in path or is_odd:
            raise UserError(f"line {number} of {file} is not path,label[,split]", "mend it")
        found = locate(path, file.parent)
        if several and seen.setdefault(found, number) != number:
            what_to_do = "name all labels of an image in one line"
            raise UserError(f"line {number} of {file} lists {path} again, after line {seen[found]}", what_to_do)
        labels = labels_in(cells, label, classes, options.label_delimiter) if several else label
        groups.setdefault(part, []).append(Row(found, labels, found.removeprefix(f"{file.parent}{os.sep}")))
    if not groups:
        raise UserError(f"{file} lists no images", "write lines path,label")
    if "" in groups and len(groups) > 1:
        raise UserError(f"some lines of {file} name a split and others do not", "name one in all or in none")
    check_spellings(groups, what)
    named = [{name for row in rows for name in names_of(row)} for rows in groups.values()]
    if not any(named):
        raise UserError(f"no line of {file} has a label", "name those of each image")
    # Of one part, all: of several labels a rare one may go to what of it is evaluated on.
    class_names = in_order(classes or (named[0] if len(named) == 1 else ()), options.class_order)
    return open_rows(what, file, with_eval_split(groups, options, what), split, options, class_names)


def read_table(file: Location, what: str) -> list[tuple[int, list[str]]]:
    """The lines of a table that are not blank: (number from 1, cells).

    Raises:
      UserError: it can't be read, or the first is neither a header nor a picture's.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
        for delimiter in DELIMITERS:
            table = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
            rows = [(table.line_num, [cell.strip() for cell in row]) for row in table]
            rows = [(number, cells) for number, cells in rows if any(cells)]
            if not rows or is_start(rows[0][1], file.parent) or class_columns([cells for _, cells in rows]):
                return rows
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{what} can't be read: {getattr(error, 'strerror', None) or error}", "name a CSV file"
        ) from None
    first = next(filter(str.strip, lines))[:80]
    raise UserError(
        f"the first line of {file} names neither columns, as path,label does, nor a picture and its label: {first!r}",
        "name the columns",
    )


def columns(cells: Sequence[str]) -> dict[str, int]:
    """Which of COLUMNS are where, by the names in a line."""
    names = [*map(plain, cells)]
    return {
        column: names.index(next(name for name in known if name in names))
        for column, known in COLUMNS.items()
        if set(known) & set(names)
    }


def plain(name: str) -> str:
    """The name of a column as COLUMNS has it: 'Image Path' and 'image_path' are 'imagepath'."""
    return re.sub(r"[\W_]", "", name.lower())


def is_header(places: dict[str, int]) -> bool:
    """Whether a line with these columns is a header."""
    return {"path", "label"} <= places.keys()


def class_columns(rows: Sequence[Sequence[str]]) -> dict[str, int]:
    """The columns of a table that stand for a class each, by its name: where it has no labels, those of 0 and 1 only.

    {} where it has fewer than two of them, or no column of paths.
    """
    header, *lines = rows
    places = columns(header)
    if "path" not in places or "label" in places or not lines:
        return {}
    others = {name: place for place, name in enumerate(header) if name and place not in places.values()}
    # A line that is too short is told of by itself.
    found = {name: i for name, i in others.items() if all(cells[i] in BINARY for cells in lines if i < len(cells))}
    return found if len(found) > 1 else {}


def check_columns(file: Location, header: Sequence[str], places: dict[str, int], classes: dict[str, int]) -> None:
    """Warn of columns that might have been meant as classes beside `classes`, and are none.

    Raises:
      UserError: two columns stand for one class.
    """
    twice = next((name for name in classes if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{file} has two columns {twice!r}", "rename one")
    known = {*places.values(), *classes.values()}
    others = [name for place, name in enumerate(header) if place not in known]
    if classes and others:
        warn_once(f"{file}: no classes, for they are not 0 or 1 in every line, are {', '.join(map(repr, others))}")


def labels_in(cells: Sequence[str], label: str, classes: dict[str, int], delimiter: str) -> tuple[str, ...]:
    """The labels of a line: those columns of `classes` that hold a 1, or without such what `label` lists; in order."""
    if classes:
        return tuple(sorted(name for name, place in classes.items() if BINARY[cells[place]]))
    return tuple(sorted({part.strip() for part in label.split(delimiter)} - {""}))


def is_start(cells: Sequence[str], root: Location) -> bool:
    """Whether a table can begin with this line: a header, or a picture and its label."""
    if is_header(columns(cells)):
        return True
    is_picture = cells[0].lower().endswith(EXTENSIONS) or (bool(cells[0]) and listing.is_file(locate(cells[0], root)))
    return len(cells) > 1 and is_picture


def locate(path: str, root: Location) -> str:
    """The file that a cell names, from `root`."""
    if storage.is_remote(path):
        return path
    found = os.path.join(str(root), path)
    return found if "\\" not in path or listing.is_file(found) else os.path.join(str(root), path.replace("\\", "/"))
