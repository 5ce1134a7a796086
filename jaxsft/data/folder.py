"""`folder:PATH`: images in torchvision's ImageFolder layout."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jaxsft import cli, storage
from jaxsft.cli import UserError
from jaxsft.data import listing
from jaxsft.data.base import Options
from jaxsft.data.files import Files, Row, open_rows, with_eval_split
from jaxsft.data.splits import asks_for, canonical, check_spellings
from jaxsft.storage import Location

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
LAYOUTS = "it must hold train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg"


def open_folder(name: str, split: str, options: Options) -> Files:
    """A split of PATH/SPLIT/CLASS/*.jpg, or of one tree PATH/CLASS/*.jpg, divided by `options.eval_fraction`.

    The classes are the folders of 'train' by name, and the files of a class come in torchvision's order. 'train' alone
    is divided as one tree is. What lies beside pictures and classes is counted in a warning.

    Raises:
      UserError: no such folder or split, nothing in it, a class without images, a class that 'train' lacks, two
        spellings of a split, a split without class folders, a broken image (with on_error 'raise').
    """
    root, what = storage.location(name), f"folder:{name}"
    listing.read(root)
    if not name or not listing.is_folder(root):
        raise UserError(f"{what} is no folder", "name one as folder:PATH")
    passed: Counter[str] = Counter()
    parts = split_folders(root, options)
    check_spellings(parts, what)
    groups: dict[str, list[Row]] = {}
    for part in parts:
        groups[part] = classes_of(root / part, root, options, passed, must_hold=canonical(part) == "train")
        if not groups[part] and scan(root / part)[1]:
            if canonical(part) == "train" or asks_for(split, part):
                raise UserError(f"{root / part} holds pictures but no class folders", "sort them into a folder a class")
            warn_once(f"{root / part} holds pictures but no class folders: it is left out")
            del groups[part]
    if not options.labelled and not parts and scan(root)[1]:
        groups = {"train": [Row(path, "", path.removeprefix(f"{root}{os.sep}")) for path in images(root, options)]}
        return open_rows(what, root, groups, split, options)
    if not parts:
        groups = {"": classes_of(root, root, options, passed, must_hold=True)}
    if passed:
        kinds = ", ".join(sorted(passed))
        warn_once(f"{what}: {counted(passed.total(), 'file')} of other kinds passed over ({kinds})")
    if not any(groups.values()):
        raise UserError(f"{what} holds no images", LAYOUTS)
    return open_rows(what, root, with_eval_split(groups, options, what), split, options)


def split_folders(root: Location, options: Options) -> list[str]:
    """The folders in `root` that are splits; none where it is one tree of classes.

    They are splits where all that hold images have a split's name, or where the one named as 'train' holds folders and
    no image of its own: bus/, car/ and train/ with images directly in them are three classes.
    """
    top = folders(root)
    named = [name for name in top if canonical(name)]
    if not named:
        return []
    others = [name for name in top if name not in named and any(names for _, names, _ in walk(root / name, options))]
    if not others:
        return named
    trains = [scan(root / name) for name in named if canonical(name) == "train"]
    return [name for name in top if name in named + others] if any(f and not p for f, p, _ in trains) else []


def classes_of(root: Location, base: Location, options: Options, passed: Counter[str], must_hold: bool) -> list[Row]:
    """The image files of every class folder in `root`, their keys from `base`.

    Raises:
      UserError: a folder that can't be read or, where a class `must_hold` images, one without (with on_error 'raise').
    """
    rows: list[Row] = []
    for label in folders(root):
        found = images(root / label, options, passed)
        if not found and must_hold:
            if options.on_error == "raise":
                raise UserError(f"{root / label} holds no images ({', '.join(EXTENSIONS)})", "remove the empty class")
            warn_once(f"{root / label} holds no images: the class is left out")
        rows += [Row(path, label, path.removeprefix(f"{base}{os.sep}")) for path in found]
    loose = scan(root)[1]
    if rows and loose:
        warn_once(f"{root}: {counted(len(loose), 'picture')} beside the class folders passed over")
    return rows


def images(root: Location, options: Options, passed: Counter[str] | None = None) -> list[str]:
    """The image files under `root`, links followed, in the order of torchvision's `make_dataset`.

    A link that leads back to a folder it lies in is not followed. Hidden files are no images (macOS writes ._x.jpg).

    Args:
      root: a folder.
      options: on_error says what to do about a folder that can't be read.
      passed: the endings of the other files are counted in it.

    Raises:
      UserError: a folder can't be read (with on_error 'raise').
    """
    found = sorted(walk(root, options))
    if passed is not None:
        passed.update(os.path.splitext(name)[1].lower() or "no ending" for _, _, others in found for name in others)
    return [os.path.join(folder, name) for folder, names, _ in found for name in names]


def walk(root: Location, options: Options) -> Iterator[tuple[str, list[str], list[str]]]:
    """`root` and each folder below it, with the names of its images and of its other files."""
    above: tuple[str, ...] = ()
    if isinstance(root, Path):  # in a bucket there are no links
        above = (os.path.realpath(root.parent), *map(str, Path(os.path.realpath(root)).parents))
    return walk_below(str(root), above, options)


def walk_below(folder: str, above: tuple[str, ...], options: Options) -> Iterator[tuple[str, list[str], list[str]]]:
    """See `walk`; `above` are the real paths of the folders that this one lies in."""
    real = os.path.realpath(folder)
    if real in above:
        warn_once(f"{folder} links back to {real}: not followed")
        return
    try:
        below, names, others = scan(folder)
    except UserError as error:
        if options.on_error == "raise":
            raise
        warn_once(f"left out: {error}")
        return
    yield folder, names, others
    for name in below:
        yield from walk_below(os.path.join(folder, name), (*above, real), options)


def folders(path: Location) -> list[str]:
    """The names of the folders in `path`, sorted, without hidden ones."""
    return scan(path)[0]


def scan(path: Location | str) -> tuple[list[str], list[str], list[str]]:
    """The names of the folders, the images and the other files in `path`, each sorted, without hidden ones.

    Raises:
      UserError: it can't be read.
    """
    try:
        below, files = ([name for name in names if not name.startswith(".")] for names in listing.scan(path))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}", "make it readable") from None
    pictures = [name for name in files if name.lower().endswith(EXTENSIONS)]
    return below, pictures, [name for name in files if not name.lower().endswith(EXTENSIONS)]


def counted(number: int, thing: str) -> str:
    """'1 file', '2 files'."""
    return f"{number} {thing}{'s' * (number != 1)}"


@functools.cache
def warn_once(message: str) -> None:
    """A warning about a folder, which is listed for each split anew."""
    cli.warn(message)
