"""The training split, opened once for many runs, and the parts of it that each trains and is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft.cli import UserError
from jaxsft.data.base import Arrays, Part, Source
from jaxsft.data.sources import open_training
from jaxsft.data.splits import folds
from jaxsft.run.prepare import check_data

Splits = tuple[Source, Source]  # to train and to evaluate on


class Pool(NamedTuple):
    """The training split, and of each image the fold that it is in; the split to evaluate on is never looked at."""

    source: Source
    fold: np.ndarray  # int [N], 0 .. folds - 1
    folds: int

    def rows(self, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the images outside a fold, and of those in it; int32, sorted."""
        inside = self.fold == fold
        return np.flatnonzero(~inside).astype(np.int32), np.flatnonzero(inside).astype(np.int32)

    def splits(self, fold: int) -> Splits:
        """What a run trains on that is evaluated on a fold, and the fold."""
        trained, held_out = (part(self.source, rows) for rows in self.rows(fold))
        return trained, held_out


def part(source: Source, rows: np.ndarray) -> Source:
    """Some images of a source; an array is shared by all its parts."""
    return Part(source, rows) if isinstance(source, Arrays) else source.select(rows)


def open_pool(config: ConfigDict, count: int, used: Sequence[int] | None = None) -> Pool:
    """Open the training split of a config and divide it into folds by class, keyed by the seed.

    Args:
      config: of the runs.
      count: how many folds.
      used: those that are evaluated on; None: all.

    Raises:
      UserError: the data can't be had, there are fewer images than folds, or what is left to train on is too little.
    """
    cli.say(f"reading {config.data.source} ...")
    source = open_training(config)
    check_data(config, source)
    if source.multi_label:
        raise UserError(
            f"the images of {config.data.source} have several labels", "search with images of one label each"
        )
    smallest = int(np.bincount(source.labels)[np.unique(source.labels)].min())
    if count > len(source):
        raise UserError(f"--folds is {count}", f"there are {len(source)} training images: take fewer")
    if smallest < count:
        cli.warn(f"a class has {smallest} training images: it is not in each of {count} folds")
    pool = Pool(source, folds(source.labels, count, config.seed), count)
    for fold in range(count) if used is None else used:
        check_data(config, pool.splits(fold)[0])
    return pool
