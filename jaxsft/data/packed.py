"""`packed:DIR`: pictures that `jaxsft.data.pack` wrote, read at random from files of records.

DIR holds `index.json`, whose keys this file names, and of each split files of records (see `records`): decoded
pictures, or the files of pictures as they were.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from jaxsft import storage
from jaxsft.buckets import BucketPath
from jaxsft.cli import UserError
from jaxsft.data import decode, records
from jaxsft.data.base import Image, Options, Shrunk, Source
from jaxsft.data.records import Record
from jaxsft.data.splits import resolved, shuffled, slices
from jaxsft.storage import Location

INDEX, FORMAT, VERSION = "index.json", "jaxsft.packed", 1
AGAIN = "pack it again: python -m jaxsft.data.pack"
NAME = re.compile(r"[\w-][\w.-]*")  # of a file of records: of a stranger's index too it stays in its folder


@dataclasses.dataclass(frozen=True)
class Packed(Source):
    """Some pictures of a packed set."""

    files: tuple[str, ...]  # of records, on this machine
    places: np.ndarray  # int32 [N, 2], (number of the file, of the record in it)
    labels: np.ndarray  # int32 [N] or uint8 [N, K]
    class_names: tuple[str, ...]
    names: tuple[str, ...]  # of the images, as the source that was packed had them
    decoded: bool  # whether records are pixels, not files
    upright: bool = True
    size: tuple[int, int] | None = None
    split: str = ""
    listing: str = ""
    shrunk: Shrunk | None = None
    version: str = ""

    def picture(self, index: int) -> Image | Record:
        """The record of an image that was decoded before, or the image. Raises decode.Unreadable."""
        file, position = self.places[index].tolist()
        content = records.read(self.files[file], position)
        return records.from_bytes(content) if self.decoded else decode.read_rgb(content, self.upright)

    def __getitem__(self, index: int) -> Image:
        found = self.picture(index)
        return found.image() if isinstance(found, Record) else found

    def encoded(self, index: int) -> bytes | None:
        file, position = self.places[index].tolist()
        return None if self.decoded else records.read(self.files[file], position)

    def select(self, indices: np.ndarray) -> Packed:
        names = tuple(self.names[i] for i in indices)
        return dataclasses.replace(self, places=self.places[indices], labels=self.labels[indices], names=names)

    def name(self, index: int) -> str:
        return self.names[index]


def open_packed(name: str, split: str, options: Options) -> Packed:
    """A split of a packed set, of this machine, or of a bucket, which is copied into the user's cache.

    Splits, slices, classes, labels and names are those of the source that was packed.

    Raises:
      UserError: it is none, was not finished, is damaged or of a later version; no such split; pictures were turned
        otherwise when they were packed.
    """
    what, place = f"packed:{name}", storage.location(name)
    try:
        content = (place / INDEX).read_bytes()
    except OSError as error:
        known = place.exists() and f"{place} has no {INDEX}: it was not packed to its end"
        raise UserError(known or f"{what} can't be read: {error.strerror or error}", AGAIN) from None
    try:
        index = json.loads(content)
        if index["format"] != FORMAT:
            raise ValueError(FORMAT)
        if index["version"] > VERSION:
            raise UserError(f"{what} is of version {index['version']}, which this program does not know", AGAIN)
        return opened(index, what, place, hashlib.sha256(content).hexdigest(), split, options)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise UserError(f"{place / INDEX} is damaged", AGAIN) from None


def opened(index: dict[str, Any], what: str, place: Location, digest: str, split: str, options: Options) -> Packed:
    """See `open_packed`; of what is in an index anything may be missing or odd."""
    parts, decoded, upright = index["splits"], index["kind"] == "pixels", bool(index["upright"])
    if decoded and upright != options.upright:
        how = "as their EXIF tag says" if upright else "as they lie"
        raise UserError(
            f"{what} holds pictures {how}, and config.data.exif_orientation is {options.upright}",
            "change it, or pack them again" + " --as-they-lie" * upright,
        )
    class_names = tuple(map(str, index["class_names"]))
    counts = {part: len(entry["names"]) for part, entry in parts.items()}
    split = resolved(split, counts, what)
    files: list[str] = []
    places, labels, names, sizes = [], [], [], []
    for part, start, stop in slices(split, counts, what):
        entry = parts[part]
        own = [(shard["file"], int(shard["records"]), int(shard["bytes"])) for shard in entry["shards"]]
        lengths = [length for _, length, _ in own]
        if not sum(lengths) == len(entry["labels"]) == len(entry["sizes"]) == counts[part] or min(lengths) < 0:
            raise ValueError(part)
        whole = np.arange(counts[part])
        chosen = np.sort(shuffled(whole, 0, 0)[start:stop]) if entry["scattered"] else whole[start:stop]
        file_of = np.repeat(np.arange(len(own)), lengths)
        position_of = np.concatenate([np.arange(length) for length in lengths])
        places.append(np.stack([file_of[chosen] + len(files), position_of[chosen]], 1).astype(np.int32))
        labels.append(labels_of(entry["labels"], len(class_names), bool(index["multi_label"]))[chosen])
        sizes.append(np.array(entry["sizes"], np.int64).reshape(-1, 2)[chosen])
        names += [str(entry["names"][number]) for number in chosen]
        files += had(place, digest, own, what)
    found, every = np.concatenate(sizes), np.concatenate(labels)
    short, interpolation = int(index["size"] or 0), str(index["interpolation"])
    stored = np.array([stored_size(height, width, short) for height, width in found.tolist()]).reshape(-1, 2)
    one_size = len(stored) > 0 and bool((stored == stored[0]).all())
    return Packed(
        tuple(files),
        np.concatenate(places),
        every,
        class_names,
        tuple(names),
        decoded,
        options.upright,
        (int(stored[0, 0]), int(stored[0, 1])) if one_size else None,
        split,
        listing(names, every),
        Shrunk(short, interpolation) if (stored != found).any() else None,
        f"{digest} {options.upright}",
    )


def labels_of(labels: Sequence[Any], classes: int, several: bool) -> np.ndarray:
    """The labels of an index, the number of a class for each image or a list of such, as `Source` has them."""
    if not several:
        return np.array(labels, np.int32).reshape(-1)
    found = np.zeros((len(labels), classes), np.uint8)
    for row, numbers in zip(found, labels, strict=True):
        row[numbers] = 1
    return found


def listing(names: Iterable[str], labels: np.ndarray) -> str:
    """sha256 of names and labels in their order."""
    digest = hashlib.sha256(np.ascontiguousarray(labels).tobytes())
    for name in names:
        digest.update(f"{name}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()


def stored_size(height: int, width: int, short: int) -> tuple[int, int]:
    """The (height, width) px of a picture whose short side is made `short` (0: left alone), unless it is shorter."""
    if not short or min(height, width) <= short:
        return height, width
    long = short * max(height, width) // min(height, width)  # as in `decode.middle`
    return (short, long) if height <= width else (long, short)


def had(place: Location, digest: str, shards: Sequence[tuple[str, int, int]], what: str) -> list[str]:
    """The files of records of a split on this machine.

    Args:
      place: where the set lies.
      digest: of its index; the copy of a bucket's goes by it, for another set may lie there tomorrow.
      shards: (name, records, bytes) of each.
      what: the data's name, for messages.

    Raises:
      UserError: one is missing, has not the length that the index says, or can't be copied.
    """
    if any(not NAME.fullmatch(name) for name, _, _ in shards):
        raise ValueError(what)
    folder = place
    if isinstance(place, BucketPath):
        folder = Path(platformdirs.user_cache_dir("jaxsft")) / "packed" / digest[:16]
        try:
            storage.mirror(place, folder, [name for name, _, _ in shards])
        except OSError as error:
            raise UserError(f"{what} can't be copied to {folder}: {error.strerror or error}", "make room") from None
    assert isinstance(folder, Path)
    for name, _, length in shards:
        file = folder / name
        there = file.stat().st_size if file.is_file() else -1
        if there != length:
            state = "is missing" if there < 0 else f"has {there} bytes, and {INDEX} says {length}"
            raise UserError(f"{file} {state}", AGAIN)
    records.reader.cache_clear()  # another set may have lain there before
    return [str(folder / name) for name, _, _ in shards]
