"""`csv:FILE`: images listed in a table, with columns of paths, labels and, if wanted, splits."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence

from jaxsft import storage
from jaxsft.cli import UserError
from jaxsft.data import listing
from jaxsft.data.base import Options
from jaxsft.data.files import Files, Row, open_rows, with_eval_split
from jaxsft.data.folder import EXTENSIONS
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


def open_csv(name: str, split: str, options: Options) -> Files:
    """The images listed in a CSV file: path (from the file's folder), label and, if wanted, split.

    Its first line may name the COLUMNS, in any order and among others; cells are separated by one of DELIMITERS.
    Backslashes in paths separate folders where no file has them in its name. Without splits the rows are divided by
    `options.eval_fraction`.

    Raises:
      UserError: no such file, a first line that neither names columns nor a picture, a line that does not fit, and as
        `open_rows`.
    """
    file, what = storage.location(name), f"csv:{name}"
    listing.read(file.parent)
    numbered = read_table(file, what)
    if not numbered:
        raise UserError(f"{file} lists no images", "write lines path,label")
    places, width = columns(numbered[0][1]), len(numbered[0][1])
    if has_header := is_header(places):
        del numbered[0]
    else:
        places = {"path": 0, "label": 1, "split": 2}
    groups: dict[str, list[Row]] = {}
    for number, cells in numbered:
        if has_header and len(cells) != width:
            raise UserError(f"line {number} of {file} has {len(cells)} cells, its header {width}", "mend it")
        path, label, part = (cells[places[k]] if places.get(k, width) < len(cells) else "" for k in COLUMNS)
        if not path or not label or "\0" in path or (not has_header and (len(cells) > 3 or not all(cells))):
            raise UserError(f"line {number} of {file} is not path,label[,split]", "mend it")
        found = locate(path, file.parent)
        groups.setdefault(part, []).append(Row(found, label, found.removeprefix(f"{file.parent}{os.sep}")))
    if not groups:
        raise UserError(f"{file} lists no images", "write lines path,label")
    if "" in groups and len(groups) > 1:
        raise UserError(f"some lines of {file} name a split and others do not", "name one in all or in none")
    check_spellings(groups, what)
    return open_rows(what, file, with_eval_split(groups, options, what), split, options)


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
            if not rows or is_start(rows[0][1], file.parent):
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
