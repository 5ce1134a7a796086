"""`tfds:NAME`: image classification sets of TFDS, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import platformdirs

from jaxsft import storage
from jaxsft.cli import OFFLINE, UserError, nearest, run_module
from jaxsft.data import decode
from jaxsft.data.base import Arrays, Options, Source, changed
from jaxsft.data.index import load_arrays, save_arrays
from jaxsft.data.splits import resolved, slices
from jaxsft.progress import progress

Parts = tuple[tuple[str, int, int], ...]  # (split, from, to)
FEATURES = "tensorflow_datasets.core.features."  # where TFDS keeps its own classes of features
AGAIN = "prepare the set again"


def open_tfds(name: str, split: str, options: Options) -> Source:
    """A prepared TFDS set: an array kept in the user's cache where its images have one size and fit, else streamed."""
    builder = tfds_builder(name, options.data_dir)
    features = builder.info.features
    if not are_images_of_classes(features):
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
        return changed(Arrays(images, labels, class_names, split=split), splits=tuple(sizes))
    (labels,) = cached(builder, parts, "labels", lambda: (labels_of(builder, parts, total),))
    numbers, where = np.arange(total), str(builder.data_path)
    version = f"{written(where)} {options.upright}"
    found = Examples(where, parts, numbers, labels, class_names, size, options.upright, split, version)
    return changed(found, splits=tuple(sizes))


def are_images_of_classes(features: Any) -> bool:
    """Whether `features` has an image and a label as `open_tfds` reads them."""
    from jaxsft.models.weights import MOST_CLASSES  # brings JAX, which the workers do without

    tfds = own_tfds()
    if not isinstance(features, tfds.features.FeaturesDict) or not {"image", "label"} <= set(features):
        return False
    image, label = features["image"], features["label"]
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        return False
    sides = image.shape[:2]
    return (
        len(image.shape) == 3
        and all(s is None or s > 0 for s in sides)
        and 0 < (label.num_classes or 0) <= MOST_CLASSES
    )


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
    version: str = ""

    def __getitem__(self, index: int) -> PIL.Image.Image:
        content = self.content(index)
        image = decode.read_rgb(content, self.upright and self.size is None)  # else one size is as they lie
        if self.size not in (None, image.size[::-1]):
            raise decode.Unreadable(f"{image.height} x {image.width} px, where the set says {self.size}")
        return image

    def content(self, index: int) -> bytes:
        """The file of an image, as the set holds it. Raises decode.Unreadable."""
        part, number = self.position(index)
        try:
            encoded = reader(self.data_path, part)[number]["image"]
        except Exception as error:  # see `examples`
            raise decode.Unreadable(reason(error)) from None
        if not isinstance(encoded, bytes):
            raise decode.Unreadable("its record is damaged")
        return encoded

    def encoded(self, index: int) -> bytes | None:
        return self.content(index) if self.size is None else None  # which are not to be turned

    def position(self, index: int) -> tuple[str, int]:
        """The split of an example and its number there."""
        number = int(self.numbers[index])
        for part, start, stop in self.parts:
            if number < stop - start:
                return part, start + number
            number -= stop - start
        raise IndexError(index)

    def select(self, indices: np.ndarray) -> Examples:
        return dataclasses.replace(self, numbers=self.numbers[indices], labels=self.labels[indices])

    def name(self, index: int) -> str:
        part, number = self.position(index)
        return f"example {number} of split {part} in {self.data_path}"


@functools.lru_cache(maxsize=8)
def reader(data_path: str, part: str) -> Any:
    """Random access to a split whose images stay encoded; one for a process."""
    tfds = own_tfds()
    builder = tfds.builder_from_directory(data_path)
    return builder.as_data_source(split=part, decoders={"image": tfds.decode.SkipDecoding()})


def cached(builder: Any, parts: Parts, what: str, make: Any) -> tuple[np.ndarray, ...]:
    """The arrays that `make` returns, from the user's cache where they are there."""
    from jaxsft.models.weights import cache_dir  # brings JAX, which the workers do without

    identity = [builder.info.full_name, written(builder.data_path), parts]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = cache_dir() / what / f"{builder.info.name}-{key}.npz"
    kept = load_arrays(path)
    names = [str(i) for i in range(len(kept))]
    if kept and kept.keys() == set(names):
        return tuple(kept[name] for name in names)
    made = make()
    save_arrays(path, **{str(i): array for i, array in enumerate(made)})
    return tuple(made)


def written(data_path: Any) -> int:
    """When a prepared set was last written to, in ns."""
    return max((entry.stat().st_mtime_ns for entry in os.scandir(data_path)), default=0)


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
            raise UserError(f"image {i} of {builder.info.full_name}: {error}", AGAIN) from None
        if pixels.shape[:2] != size:
            raise UserError(f"image {i} of {builder.info.full_name} is {pixels.shape[:2]}, not {size}", AGAIN)
        images[i], labels[i] = pixels, example["label"]
    return images, labels


def labels_of(builder: Any, parts: Parts, total: int) -> np.ndarray:
    """All labels int32 [N]."""
    return np.fromiter((e["label"] for e in examples(builder, parts, total, "reading labels of")), np.int32)


def examples(builder: Any, parts: Parts, total: int, doing: str, chunk: int = 1000) -> Iterator[dict[str, Any]]:
    """The examples of `parts`, their images still encoded, with a progress bar.

    Raises:
      UserError: they can't be read.
    """
    with progress(total=total, desc=f"{doing} {builder.info.name}", unit="image") as bar:
        for part, start, stop in parts:
            for begin in range(start, stop, chunk):
                try:
                    source = reader(str(builder.data_path), part)
                    several = source.__getitems__(list(range(begin, min(begin + chunk, stop))))
                except Exception as error:  # TFDS, protobuf and the readers of records raise many kinds
                    raise UserError(f"split {part} in {builder.data_path}: {reason(error)}", AGAIN) from None
                if damaged := [i for i, e in enumerate(several, begin) if None in (e["image"], e["label"])]:
                    what = f"record {damaged[0]} of split {part} in {builder.data_path} is damaged"
                    raise UserError(what, AGAIN)
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


def find_builder(name: str, data_dir: str, **options: Any) -> Any:
    """TFDS's builder of `name`, prepared or not.

    Args:
      name: as TFDS writes it.
      data_dir: a folder, '' for TFDS's own.
      options: of `tfds.builder`.

    Raises:
      UserError: there is no such set, what is prepared is damaged, or has features that are none of TFDS's.
    """
    where = local_data_dir(name, data_dir) if data_dir else None
    tfds = own_tfds()
    try:
        return tfds.builder(name, data_dir=where, **options)
    except tfds.core.DatasetNotFoundError:
        base = name.split("/")[0].split(":")[0]
        known = tfds.list_builders(with_community_datasets=False)
        hint = nearest(base, known) if difflib.get_close_matches(base, known) else "see TFDS's catalog"
        raise UserError(f"TFDS has no data set {name!r}", hint) from None
    except Exception as error:  # a wrong name, or files of strangers, make TFDS raise nearly anything
        raise UserError(f"tfds:{name}: {reason(error)}", f"see TFDS's catalog, or {AGAIN}") from None


def local_data_dir(name: str, data_dir: str) -> str:
    """`data_dir`, or of one in a bucket a copy of the set on this machine: its readers open no others.

    Raises:
      UserError: the bucket can't be read, or the disk written.
    """
    place = storage.location(data_dir)
    if isinstance(place, Path):
        return str(place)
    base = re.split("[:/]", name)[0]
    copy = Path(platformdirs.user_cache_dir("jaxsft")) / "data" / hashlib.sha256(data_dir.encode()).hexdigest()[:16]
    try:
        storage.mirror(place / base, copy / base)
    except OSError as error:
        what = f"{place / base} can't be copied to {copy}: {error.strerror}"
        raise UserError(what, "name another --config.data.data_dir") from None
    return str(copy)


def reason(error: Exception) -> str:
    """The first line of what an exception says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


class Foreign(ValueError):
    """A prepared set has features whose code is not TFDS's."""


@functools.cache
def own_tfds() -> Any:
    """The module `tensorflow_datasets`, which from now on imports no code that a prepared set names.

    The features.json of a set says the classes of its features as MODULE.CLASS, and TFDS imports any MODULE in order to
    find one that it does not know: a downloaded data set would run whatever it names. All of these names, however deep
    in which form of the file, come to `FeatureConnector.cls_from_name`.
    """
    import tensorflow_datasets as tfds

    base = tfds.features.FeatureConnector
    resolve = base.cls_from_name

    def cls_from_name(cls: Any, python_class_name: str) -> Any:
        if python_class_name not in base._registered_features and not python_class_name.startswith(FEATURES):
            raise Foreign(f"its features.json names {python_class_name}, which is none of TFDS's own features")
        return resolve(python_class_name)

    base.cls_from_name = classmethod(cls_from_name)
    return tfds
