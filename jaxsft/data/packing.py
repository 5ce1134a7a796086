"""How pictures are packed by `python -m jaxsft.data.pack`: files of records of each split, and at the end an index.

Until the index is there nothing can be read. Beside each file of records lies meanwhile what is in it: an interrupted
command goes on after the last of them, and whether it is the same one shows in a key that goes by all that the index
says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from jaxsft import cli, storage
from jaxsft.cli import UserError
from jaxsft.data import decode, records
from jaxsft.data.base import Options, Source
from jaxsft.data.fingerprint import digest
from jaxsft.data.packed import FORMAT, INDEX, VERSION, stored_size
from jaxsft.data.sources import open_source, with_classes
from jaxsft.data.threads import in_order
from jaxsft.progress import progress
from jaxsft.storage import Location

SHARD_MB = 128  # a bucket serves objects of this size at full speed, and few of them are lost time where one fails
AHEAD = 100  # pictures that may wait for one before them
NOT_WRITTEN = "name another --out, or make room; the same command then goes on"


@dataclasses.dataclass(frozen=True)
class Form:
    """How pictures are packed."""

    size: int = 0  # px, what the short side of larger pictures is made; 0: pictures are kept as their files
    interpolation: str = "bilinear"
    shard_mb: int = SHARD_MB

    def packed(self, source: Source, number: int) -> tuple[bytes, tuple[int, int]]:
        """The record of a picture, and its own (height, width) px.

        Raises:
          decode.Unreadable: it is broken.
        """
        image = source[number]
        if isinstance(image, np.ndarray):
            image = PIL.Image.fromarray(image)
        size = (image.height, image.width)
        if not self.size:
            content = source.encoded(number)
            return as_png(image) if content is None else content, size
        height, width = stored_size(*size, self.size)
        if (height, width) != size:
            image = image.resize((width, height), decode.resampling(self.interpolation))
        return records.on_its_side(np.asarray(image), size).to_bytes(), size


def as_png(image: PIL.Image.Image) -> bytes:
    """A picture that lies in no file, as one that loses nothing."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def pack(spec: str, out: Location, form: Form, options: Options, threads: int | None = None) -> dict[str, Any]:
    """Pack every split of a source into `out`, and return the index that was written there last.

    Args:
      spec: 'KIND:NAME', as `sources.open_source` takes it.
      out: a folder, or a place in a bucket, where there is none; or one that an interrupted `pack` of the same left.
      form: of the records.
      options: that the source is opened with.
      threads: that decode; None: one a core.

    Raises:
      UserError: the source can't be read, a picture is broken (with on_error 'raise'), `out` is packed already or holds
        something else, or can't be written.
    """
    records.array_record()
    options = dataclasses.replace(options, resident_mb=0)  # one after the other, not all in memory
    try:
        if (out / INDEX).exists():
            raise UserError(f"{out} is packed already", "name another --out, or remove it")
        splits = opened_splits(spec, options)
        if isinstance(out, Path):
            out.mkdir(parents=True, exist_ok=True)
        storage.try_to_write(out)
        first = next(iter(splits.values()))
        index: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "source": spec,
            "kind": "pixels" if form.size else "files",
            "size": form.size or None,
            "interpolation": form.interpolation,
            "upright": options.upright,
            "class_names": list(first.class_names),
            "multi_label": first.multi_label,
            "splits": {part: split_of(source, part, form) for part, source in splits.items()},
        }
        for position, (part, source) in enumerate(splits.items()):
            prefix = part if re.fullmatch(r"[\w-]+", part) else f"split{position}"
            key = hashlib.sha256(json.dumps([index, source.version]).encode()).hexdigest()
            with progress(total=len(source), desc=f"packing {part}", unit="image") as bar:
                shards = [*packed_shards(source, prefix, out, key, form, options, threads, bar.update)]
            finish(index["splits"][part], shards)
        storage.write_file(out / INDEX, json.dumps(index).encode())
        for entry in index["splits"].values():
            for shard in entry["shards"]:
                (out / sidecar(shard["file"])).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{out} can't be written: {error.strerror or error}", NOT_WRITTEN) from None
    return index


def opened_splits(spec: str, options: Options) -> dict[str, Source]:
    """Every split of a source by its name, their classes numbered alike. Raises UserError."""
    try:
        first = open_source(spec, "train", options)
    except UserError as error:
        if "has no split" not in str(error):
            raise
        first = open_source(spec, "", options)
    if first.splits:
        found = {part: first if part == first.split else open_source(spec, part, options) for part in first.splits}
    else:  # a source of a config file, of which no more is known than what a run asks for
        found = {"train": first, "val": open_source(spec, "", options)}
    names = first.class_names
    return {part: with_classes(s, names, f"split {part} of {spec}", "the first") for part, s in found.items()}


def split_of(source: Source, part: str, form: Form) -> dict[str, Any]:
    """What the index says of a split before it is packed."""
    labels = np.asarray(source.labels)
    return {
        "scattered": bool(source.scattered),
        "listing": digest(source),
        "names": [source.name(number) for number in range(len(source))],
        "labels": [np.flatnonzero(row).tolist() for row in labels] if source.multi_label else labels.tolist(),
        "left_out": [list(pair) for pair in source.bad],
    }


def packed_shards(
    source: Source,
    prefix: str,
    out: Location,
    key: str,
    form: Form,
    options: Options,
    threads: int | None,
    moved: Callable[[int], object],
) -> Iterator[dict[str, Any]]:
    """Write the files of records of a split, and say of each what is in it; those that are there are left as they are.

    Beside each lies, until all is done, what is said of it: so an interrupted command knows where to go on, and whether
    it was the same one, by `key`.
    """
    number = shard = 0
    while number < len(source) and (row := kept(out, file_of(prefix, shard), key)):
        moved(row["next"] - number)
        number, shard = row["next"], shard + 1
        yield row
    # From here on anew, what lies there is replaced.
    contents: list[bytes] = []
    row = new_row(file_of(prefix, shard))
    numbers = range(number, len(source))
    done = in_order(lambda i: attempt(source, i, form), numbers, AHEAD, threads)
    for number, found in zip(numbers, done, strict=True):
        moved(1)
        if isinstance(found, decode.Unreadable):
            if options.on_error == "raise":
                raise UserError(
                    f"{source.name(number)}: {found}", "remove it, or leave such pictures out with --on-error=skip"
                )
            cli.warn(f"left out {source.name(number)}: {found}")
            row["left_out"].append([number, str(found)])
        else:
            contents.append(found[0])
            row["sizes"].append([*found[1]])
            row["bytes"] += len(found[0])
        if row["bytes"] >= form.shard_mb * 2**20 or number == len(source) - 1:
            yield write(out, row, contents, number + 1, key)
            shard += 1
            row, contents = new_row(file_of(prefix, shard)), []


def attempt(source: Source, number: int, form: Form) -> tuple[bytes, tuple[int, int]] | decode.Unreadable:
    """`Form.packed`, or why a picture can't be."""
    try:
        return form.packed(source, number)
    except decode.Unreadable as error:
        return error


def file_of(prefix: str, number: int) -> str:
    """The name of a file of records of a split."""
    return f"{prefix}-{number:05d}{records.SUFFIX}"


def new_row(file: str) -> dict[str, Any]:
    """Of a file of records in which there is nothing yet."""
    return {"file": file, "sizes": [], "left_out": [], "bytes": 0}


def write(out: Location, row: dict[str, Any], contents: list[bytes], after: int, key: str) -> dict[str, Any]:
    """Write a file of records and, after it, what is said of it. Raises OSError."""
    length = records.write_shard(out / row["file"], contents)
    row |= {"records": len(contents), "bytes": length, "next": after, "key": key}
    storage.write_file(out / sidecar(row["file"]), json.dumps(row).encode())
    return row


def sidecar(file: str) -> str:
    """The name of what is said of a file of records while not all are written."""
    return file.removesuffix(records.SUFFIX) + ".json"


def kept(out: Location, file: str, key: str) -> dict[str, Any] | None:
    """What an interrupted command said of a file of records; None where there is none.

    Raises:
      UserError: it was another command.
    """
    try:
        row = json.loads((out / sidecar(file)).read_text())
        length = storage.length(out / file)
        if row["key"] != key:
            raise UserError(f"{out} holds another set that is packed half", "name another --out, or remove it")
        return row if length == row["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finish(entry: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """What the index says of a split after it was packed: without what was left out."""
    lost = {number: reason for shard in shards for number, reason in shard["left_out"]}
    entry["left_out"] += [[entry["names"][number], reason] for number, reason in lost.items()]
    for column in ("names", "labels"):
        entry[column] = [value for number, value in enumerate(entry[column]) if number not in lost]
    entry["sizes"] = [size for shard in shards for size in shard["sizes"]]
    entry["shards"] = [{name: shard[name] for name in ("file", "records", "bytes")} for shard in shards]
