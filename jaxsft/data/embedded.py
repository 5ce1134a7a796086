"""The embedded images: 2,000 of CIFAR-10's training images ('train') and 1,000 of its test images ('test')."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image

from jaxsft.data.base import Arrays, Options, changed
from jaxsft.data.splits import resolved, slices

SAMPLE = Path(__file__).parent / "sample"
WEIGHTS = SAMPLE / "resnet10_w16.safetensors"


def open_sample(name: str, split: str, options: Options) -> Arrays:
    """A split of the embedded images."""
    description = json.loads((SAMPLE / "labels.json").read_text())
    sizes = {part: len(description[part]) for part in ("train", "test")}
    split = resolved(split, sizes, "sample")
    parts = [(part, slice(start, stop)) for part, start, stop in slices(split, sizes, "sample")]
    found = Arrays(
        np.concatenate([read_sheet(SAMPLE / f"{part}.png")[: sizes[part]][cut] for part, cut in parts]),
        np.concatenate([np.asarray(description[part], np.int32)[cut] for part, cut in parts]),
        tuple(description["class_names"]),
        split=split,
    )
    return changed(found, splits=tuple(sizes))


def read_sheet(path: Path) -> np.ndarray:
    """The 32 px tiles of a PNG sheet, row by row: uint8 [N, 32, 32, 3]."""
    with PIL.Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    rows, columns = pixels.shape[0] // 32, pixels.shape[1] // 32
    return pixels.reshape(rows, 32, columns, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
