"""`tfds:NAME`: image classification sets of TFDS, read without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import os
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
from tqdm import tqdm

from jaxsft.cli import OFFLINE, UserError, nearest, run_module
from jaxsft.data import decode
from jaxsft.data.base import Arrays, Options, Source
from jaxsft.data.index import save_arrays
from jaxsft.data.splits import resolved, slices

Parts = tuple[tuple[str, int, int], ...]  # (split, from, to)


def open_tfds(name: str, split: str, options: Options) -> Source:
    """A prepared TFDS set: an array kept in the user's cache where its images have one size and fit, else streamed."""
    builder = tfds_builder(name, options.data_dir)
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
        raise UserError(f"tfds:{name} has no 'image' and 'label'", "name an image classification set")
    sizes = {part: info.num_examples for part, info in builder.info.splits.items()}
    split = resolved(split, sizes, f"tfds:{name}")
    parts = tuple(slices(split, sizes, f"tfds:{name}"))
    total = sum(stop - start for _, start, stop in parts)
    class_names = tuple(features["label"].names)
    height, width, _ = features["image"].shape
    size = None if height is None or width is None else (height, width)
    if size is not None and options.fits(total, size):
        images, labels = cached(builder, parts, "arrays", lambda: decoded(builder, parts, total, size))
        return Arrays(images, labels, class_names, split=split)
    (labels,) = cached(builder, parts, "labels", lambda: (labels_of(builder, parts, total),))
    return Examples(str(builder.data_path), parts, np.arange(total), labels, class_names, size, options.upright, split)


@dataclasses.dataclass(frozen=True)
class Examples(Source):
    """Examples of a prepared TFDS set, read and decoded when asked for."""

    data_path: str
    parts: Parts
    numbers: np.ndarray  # int [N], positions in the concatenated parts
    labels: np.ndarray  # int32 [N]
    class_names: tuple[str, ...]
    size: tuple[int, int] | None = None
    upright: bool = True
    split: str = ""

    def __getitem__(self, index: int) -> PIL.Image.Image:
        part, number = self.position(index)
        return decode.read_rgb(reader(self.data_path, part)[number]["image"], self.upright)

    def position(self, index: int) -> tuple[str, int]:
        """The split of an example and its number there."""
        number = int(self.numbers[index])
        for part, start, stop in self.parts:
            if number < stop - start:
                return part, start + number
            number -= stop - start
        raise IndexError(index)

    def take(self, indices: np.ndarray) -> Examples:
        return dataclasses.replace(self, numbers=self.numbers[indices], labels=self.labels[indices])

    def name(self, index: int) -> str:
        part, number = self.position(index)
        return f"example {number} of split {part} in {self.data_path}"


@functools.lru_cache(maxsize=8)
def reader(data_path: str, part: str) -> Any:
    """Random access to a split whose images stay encoded; one for a process."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(data_path)
    return builder.as_data_source(split=part, decoders={"image": tfds.decode.SkipDecoding()})


def cached(builder: Any, parts: Parts, what: str, make: Any) -> tuple[np.ndarray, ...]:
    """The arrays that `make` returns, from the user's cache where they are there."""
    from jaxsft.weights import cache_dir  # brings JAX, which the workers do without

    identity = [str(builder.data_path), builder.info.full_name, os.stat(builder.data_path).st_mtime_ns, parts]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = cache_dir() / what / f"{builder.info.name}-{key}.npz"
    if path.exists():
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(path) as arrays:
            return tuple(arrays[str(i)] for i in range(len(arrays.files)))
    made = make()  # nothing there, or a damaged file: a cache is only ever made anew
    save_arrays(path, **{str(i): array for i, array in enumerate(made)})
    return tuple(made)


def decoded(builder: Any, parts: Parts, total: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """All images uint8 [N, H, W, 3] and labels int32 [N].

    Raises:
      UserError: one is broken, or of another size.
    """
    images, labels = np.empty((total, *size, 3), np.uint8), np.empty(total, np.int32)
    for i, example in enumerate(examples(builder, parts, total, "decoding")):
        try:
            pixels = np.asarray(decode.read_rgb(example["image"], upright=False))
        except decode.Unreadable as error:
            raise UserError(f"image {i} of {builder.info.full_name}: {error}", "prepare the set again") from None
        if pixels.shape[:2] != size:
            raise UserError(f"image {i} of {builder.info.full_name} is {pixels.shape[:2]}", "prepare the set again")
        images[i], labels[i] = pixels, example["label"]
    return images, labels


def labels_of(builder: Any, parts: Parts, total: int) -> np.ndarray:
    """All labels int32 [N]."""
    return np.fromiter((e["label"] for e in examples(builder, parts, total, "reading labels of")), np.int32, total)


def examples(builder: Any, parts: Parts, total: int, doing: str, chunk: int = 1000) -> Iterator[dict[str, Any]]:
    """The examples of `parts`, their images still encoded, with a progress bar."""
    with tqdm(total=total, desc=f"{doing} {builder.info.name}", unit="image", disable=None, leave=False) as bar:
        for part, start, stop in parts:
            source = reader(str(builder.data_path), part)
            for begin in range(start, stop, chunk):
                several = source.__getitems__(list(range(begin, min(begin + chunk, stop))))
                yield from several
                bar.update(len(several))


def tfds_builder(name: str, data_dir: str) -> Any:
    """TFDS's builder of a set prepared as array_record; where TensorFlow is installed, prepare it first.

    Preparing needs TensorFlow and happens in a process of its own (`python -m jaxsft.data.prepare`).

    Raises:
      UserError: no such set, or it is not prepared and can't be.
    """
    builder = find_builder(name, data_dir)
    if not builder.info.splits:
        prepare = ["jaxsft.data.prepare", name, *(["--data-dir", data_dir] if data_dir else [])]
        if importlib.util.find_spec("tensorflow") is None:
            raise UserError(
                f"tfds:{name} is not prepared in {builder.data_path.parent.parent}",
                f"prepare it with `pip install 'jaxsft[tfds]'` and `python -m {' '.join(prepare)}`; or {OFFLINE}",
            )
        run_module(*prepare)
        builder = find_builder(name, data_dir)
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"tfds:{name} is prepared as {builder.info.file_format.value}, which only TensorFlow reads",
            f"prepare it as array_record elsewhere: `python -m jaxsft.data.prepare {name} --data-dir DIR`",
        )
    return builder


def find_builder(name: str, data_dir: str) -> Any:
    """TFDS's builder of `name`, prepared or not.

    Raises:
      UserError: there is no such set.
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        base = name.split("/")[0].split(":")[0]
        known = tfds.list_builders(with_community_datasets=False)
        hint = nearest(base, known) if difflib.get_close_matches(base, known) else "see TFDS's catalog"
        raise UserError(f"TFDS has no data set {name!r}", hint) from None
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"tfds:{name}: {str(error).splitlines()[0]}", "see TFDS's catalog") from None
