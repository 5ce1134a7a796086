"""Pictures without labels: files, folders, patterns and lists of names, and images in memory."""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from jaxsft import storage
from jaxsft.buckets import BucketPath
from jaxsft.cli import UserError
from jaxsft.data import decode, folder, listing
from jaxsft.data.base import Image, Options, Source
from jaxsft.storage import Location

Picture = str | Location | Image  # a file, or an image in memory
SKIP = Options(on_error="skip")
BOM = b"\xef\xbb\xbf"  # what Windows' editors begin a file with
IMAGES = "name images or folders of images"


@dataclasses.dataclass(frozen=True)
class Loose(Source):
    """Pictures as they are given, each decoded when asked for; their labels mean nothing."""

    pictures: tuple[Picture, ...]
    upright: bool = True  # turn files and PIL's images as their EXIF tag says

    class_names = ("",)

    @property
    def labels(self) -> np.ndarray:  # type: ignore[override]
        return np.zeros(len(self.pictures), np.int32)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Image:
        return opened(self.pictures[index], self.upright)

    def select(self, indices: np.ndarray) -> Loose:
        return dataclasses.replace(self, pictures=tuple(self.pictures[i] for i in indices))

    def name(self, index: int) -> str:
        """Its file, or of an image in memory its place, such as 'image 3'."""
        return str(self.pictures[index]) if is_file(self.pictures[index]) else f"image {index}"


def is_file(picture: Picture) -> bool:
    """Whether a picture lies in a file, not in memory."""
    return isinstance(picture, str | Path | BucketPath)


def opened(picture: Picture, upright: bool = True) -> Image:
    """A picture as RGB. Raises decode.Unreadable."""
    if isinstance(picture, np.ndarray):
        return picture
    if isinstance(picture, PIL.Image.Image):
        try:
            return decode.turned_rgb(picture.copy(), upright)  # which is when a file that was opened is read
        except Exception as error:
            raise decode.unreadable(error) from None
    return decode.read_rgb(picture, upright)


def find(names: Sequence[str | Location], listed: Sequence[str] = ()) -> list[str]:
    """The files that are named, the images in folders that are, and the files that patterns match, each once.

    Folders are searched through as for training. A file that is named is tried whatever its ending, and one that a
    pattern matches too. A name that exists is no pattern.

    Args:
      names: what a user typed: files, folders and patterns such as 'a/*.jpg' and 'a/**/b.png'.
      listed: names from a list, which are no patterns, and of which any may be missing: that is found when it is read.

    Raises:
      UserError: a path does not exist, a pattern matches nothing, or there is nothing to look at.
    """
    found: dict[str, None] = {}
    for name in names:
        for path in matched(name):
            found.update(dict.fromkeys(in_place(path)))
    for line in listed:
        path = storage.location(line) if storage.is_remote(line) else Path(line)
        found.update(dict.fromkeys(in_place(path, must_exist=False)))
    if not found:
        where = ", ".join(map(str, names)) or "the list"
        what_to_do = f"name images or folders of {', '.join(folder.EXTENSIONS)} files"
        raise UserError(f"no image in {where}", what_to_do)
    return list(found)


def in_place(path: Location, must_exist: bool = True) -> list[str]:
    """The images in a folder, or the file itself. Raises UserError."""
    try:
        if path.is_dir():
            listing.read(path)
            return folder.images(path, SKIP)
        if must_exist:
            path.stat()
    except (OSError, ValueError) as error:
        if must_exist:
            raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}", IMAGES) from None
    return [str(path)]


def matched(name: str | Location) -> list[Location]:
    """What a name or a pattern of this machine's stands for, in the order of text. Raises UserError."""
    path = storage.location(name)
    if isinstance(path, BucketPath) or not glob.has_magic(str(path)) or os.path.lexists(path):
        return [path]
    found = sorted(walked(path) if "**" in path.parts else glob.glob(str(path)))
    if not found:
        raise UserError(f"nothing matches {path}", IMAGES)
    return [Path(match) for match in found]


def walked(pattern: Path) -> Iterator[str]:
    """The files that a pattern with `**` matches, which stands for any number of folders; one at its end for images.

    By the walk of folders, which follows no link back to where it lies.
    """
    parts = pattern.parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    wanted, root = parts[fixed:], Path(*parts[:fixed])
    if not root.is_dir():
        return
    for place, images, others in folder.walk(root, SKIP):
        above = Path(place).relative_to(root).parts
        for name in images if wanted[-1] == "**" else [*images, *others]:
            if matches((*above, name), wanted):
                yield os.path.join(place, name)


def matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the parts of a path are those of a pattern."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def names_in(content: bytes) -> list[str]:
    """The names that a list holds, one a line, or where there is a zero byte ended by zero bytes (`find -print0`)."""
    content = content.removeprefix(BOM)
    lines = content.split(b"\0") if b"\0" in content else re.split(rb"\r?\n", content)
    return [os.fsdecode(line) for line in lines if line]
