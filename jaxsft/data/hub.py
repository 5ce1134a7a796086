"""`hf:NAME[:CONFIG]`: image classification sets through Hugging Face's `datasets` (extra [hf])."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from jaxsft.cli import UserError, nearest
from jaxsft.data import decode
from jaxsft.data.base import Options, Source
from jaxsft.data.splits import divided, slices


@dataclasses.dataclass(frozen=True)
class Table(Source):
    """Rows of a `datasets.Dataset` whose images stay encoded until asked for."""

    rows: Any
    column: str
    labels: np.ndarray  # int32 [N]
    class_names: tuple[str, ...]
    upright: bool = True

    def __getitem__(self, index: int) -> PIL.Image.Image:
        cell = self.rows[int(index)][self.column]
        return decode.read_rgb(cell["bytes"] or cell["path"], self.upright)

    def take(self, indices: np.ndarray) -> Table:
        return dataclasses.replace(self, rows=self.rows.select(indices), labels=self.labels[indices])


def open_hub(name: str, split: str, options: Options) -> Table:
    """A split of a set of the Hub, of the local cache, or of a folder written by `save_to_disk`.

    A set with 'train' alone is divided by `options.eval_fraction` into 'train' and 'val'.

    Raises:
      UserError: `datasets` is not installed, no such set, no column of images or of classes.
    """
    what = f"hf:{name}"
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{what} needs the package 'datasets'", "install the extra: pip install 'jaxsft[hf]'")
    import datasets

    try:
        if (Path(name) / "dataset_dict.json").exists():
            tables = dict(datasets.load_from_disk(name))
        else:
            path, _, config = name.partition(":")
            tables = dict(datasets.load_dataset(path, config or None))
    except Exception as error:  # the Hub's client raises many kinds; all mean that the set can't be had
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{what} can't be had: {reason}", "check its name and the network") from None
    features = next(iter(tables.values())).features
    images = [k for k, v in features.items() if isinstance(v, datasets.Image)]
    classes = [k for k, v in features.items() if isinstance(v, datasets.ClassLabel)]
    if not images or not classes:
        raise UserError(f"{what} has no column of images and one of classes", nearest("image", list(features)))
    column, label = images[0], "label" if "label" in classes else classes[0]
    if list(tables) == ["train"]:
        train, held_out = divided(np.asarray(tables["train"][label]), options.eval_fraction, options.seed)
        tables = {"train": tables["train"].select(train), "val": tables["train"].select(held_out)}
    parts = slices(split, {part: len(table) for part, table in tables.items()}, what)
    rows = datasets.concatenate_datasets([tables[part].select(range(start, stop)) for part, start, stop in parts])
    rows = rows.cast_column(column, datasets.Image(decode=False))
    labels = np.asarray(rows[label], np.int32)
    return Table(rows, column, labels, tuple(features[label].names), options.upright)
