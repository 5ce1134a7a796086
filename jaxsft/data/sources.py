"""Labelled images by name: `tfds:NAME` through TFDS without TensorFlow, and the embedded `sample`."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from tqdm import tqdm

from jaxsft.cli import UserError, nearest, run_module
from jaxsft.weights import cache_dir

SAMPLE = Path(__file__).parent / "sample"
OFFLINE = (
    "name prepared data with --config.data.data_dir=DIR and weights with --config.model.weights=FILE,"
    " or run configs/cifar10.py:sample, which needs neither"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of a data set of one image size: images uint8 [N, H, W, 3], labels int32 [N], names of the classes."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def open_source(spec: str, split: str, data_dir: str = "") -> Source:
    """Open a split of a data set.

    Args:
      spec: 'tfds:NAME' (NAME[/CONFIG][:VERSION] as TFDS writes it) or 'sample'.
      split: as TFDS writes it: 'train', 'train[:5000]', 'train[90%:]', 'train[:10]+test'.
      data_dir: of TFDS; '' is its default.

    Raises:
      UserError: unknown source or split, a set that is not prepared and can't be, an empty split.
    """
    kind, _, name = spec.partition(":")
    if kind not in SOURCES:
        raise UserError(f"unknown data source {spec!r}", nearest(kind, [*SOURCES]))
    source = SOURCES[kind](name, split, data_dir)
    if not len(source):
        raise UserError(f"split {split!r} of {spec} is empty", "name another slice")
    return source


def slices(split: str, sizes: dict[str, int], what: str) -> list[tuple[str, int, int]]:
    """`split` as parts (name, from, to) of splits of the given sizes.

    Raises:
      UserError: it does not parse, or names a split that `sizes` lacks.
    """
    import tensorflow_datasets as tfds

    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0, filename_template=None)
        for name, size in sizes.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{what} has no split {split!r}: {reason}", f"known: {', '.join(sizes)}, with slices") from None
    return [
        (p.splitname, p.from_ or 0, sizes[p.splitname] if p.to is None else min(p.to, sizes[p.splitname]))
        for p in parts
    ]


def read_sheet(path: Path) -> np.ndarray:
    """The 32 px tiles of a PNG sheet, row by row: uint8 [N, 32, 32, 3]."""
    with PIL.Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    rows, columns = pixels.shape[0] // 32, pixels.shape[1] // 32
    return pixels.reshape(rows, 32, columns, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)


def open_sample(name: str, split: str, data_dir: str) -> Source:
    """The embedded images: 2,000 of CIFAR-10's training images ('train') and 1,000 of its test images ('test')."""
    description = json.loads((SAMPLE / "labels.json").read_text())
    sizes = {part: len(description[part]) for part in ("train", "test")}
    parts = [(part, slice(start, stop)) for part, start, stop in slices(split, sizes, "sample")]
    return Source(
        np.concatenate([read_sheet(SAMPLE / f"{part}.png")[: sizes[part]][cut] for part, cut in parts]),
        np.concatenate([np.asarray(description[part], np.int32)[cut] for part, cut in parts]),
        tuple(description["class_names"]),
    )


def open_tfds(name: str, split: str, data_dir: str) -> Source:
    """A prepared TFDS set of one image size, decoded once and kept as an array in the user's cache."""
    builder = tfds_builder(name, data_dir)
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise UserError(f"tfds:{name} has no 'image' and 'label'", "name an image classification set")
    shape = features["image"].shape
    if None in shape or shape[-1] not in (1, 3):
        raise UserError(f"tfds:{name} has images of shape {shape}", "name a set whose images have one size")
    sizes = {part: info.num_examples for part, info in builder.info.splits.items()}
    parts = slices(split, sizes, f"tfds:{name}")
    total = sum(stop - start for _, start, stop in parts)
    identity = [str(builder.data_path), builder.info.full_name, os.stat(builder.data_path).st_mtime_ns, parts]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    cached = cache_dir() / "arrays" / f"{builder.info.name}-{key}.npz"
    if not cached.exists():
        images = np.empty((total, *shape[:2], 3), np.uint8)
        labels = np.empty(total, np.int32)
        position = 0
        with tqdm(total=total, desc=f"decoding {name}", unit="image", disable=None, leave=False) as bar:
            for example in tfds_examples(builder, parts):
                with PIL.Image.open(io.BytesIO(example["image"])) as image:
                    images[position] = np.asarray(image.convert("RGB"))
                labels[position] = example["label"]
                position += 1
                bar.update()
        save_arrays(cached, images=images, labels=labels)
    with np.load(cached) as arrays:
        return Source(arrays["images"], arrays["labels"], tuple(features["label"].names))


def tfds_examples(builder: Any, parts: list[tuple[str, int, int]], chunk: int = 1000) -> Any:
    """The examples of `parts`, their images still encoded."""
    import tensorflow_datasets as tfds

    for part, start, stop in parts:
        reader = builder.as_data_source(split=part, decoders={"image": tfds.decode.SkipDecoding()})
        for begin in range(start, stop, chunk):
            yield from reader.__getitems__(list(range(begin, min(begin + chunk, stop))))


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write an .npz that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.npz")
    try:
        np.savez(partial, **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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


SOURCES: dict[str, Callable[[str, str, str], Source]] = {"tfds": open_tfds, "sample": open_sample}
