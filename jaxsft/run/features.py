"""Features of whole sets, computed once: on the devices like a resident set, or in a file where they are too many.

A frozen body makes the same of an image at every epoch. What the output layer trains on is therefore kept, and an epoch
is the output layer's alone. All processes of a run have all features: each computes those of its own rows of every
batch, and they are gathered. They are computed again when a run is resumed, bit-equal on the same devices.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import numpy as np

from jaxsft.cli import Stop
from jaxsft.data.base import Arrays, Source
from jaxsft.data.loader import BadFiles, Loader, Resident, Sent, make_loader, on_devices
from jaxsft.data.reading import EvalPlan, Plan
from jaxsft.learn.features import make_features_step
from jaxsft.models.weights import Preprocessing, cache_dir
from jaxsft.progress import progress
from jaxsft.run.evaluation import results
from jaxsft.run.parallel import DataParallel

if TYPE_CHECKING:
    from ml_collections import ConfigDict

PIXELS = 2**20  # of a batch, at least where its images are small: 256 of 64 px; fewer keep no device busy


class Keeper:
    """Makes the features of images by one body, and keeps them."""

    def __init__(
        self,
        config: ConfigDict,
        model: nn.Module,
        head: str,
        variables: Any,
        preprocessing: Preprocessing,
        parallel: DataParallel,
        bad: BadFiles,
    ):
        """`variables` of the whole `model` lie on the devices of `parallel`; `head` is its output layer's path."""
        self.config, self.model, self.head, self.variables = config, model, head, variables
        self.preprocessing, self.parallel, self.bad = preprocessing, parallel, bad
        self._steps: dict[Preprocessing, Callable[..., Any]] = {}

    def kept(self, source: Source, what: str, substitute: bool = False) -> Arrays:
        """The features of `source` in the place of its images.

        Args:
          source: of images; on every process the whole.
          what: the images are for, as people are told.
          substitute: of a broken image, where data.on_error is 'skip', take the features and the label of the next one
            that can be read, as training has it where it is streamed; else leave it out.

        Raises:
          UserError: an image is broken, and on_error is 'raise'.
          Stop: none can be read, or there is no room on the disk.
        """
        features, readable = self.features(source, what)
        rows, labels = np.flatnonzero(readable), source.labels
        if not len(rows):
            raise Stop(f"none of the {len(labels)} images for {what} can be read", "mend them, or name others")
        if len(rows) < len(labels):
            if substitute:
                rows = rows[np.searchsorted(rows, np.arange(len(labels))) % len(rows)]
            features, labels = features[rows], labels[rows]
        return Arrays(features, labels, source.class_names)

    def loader(self, kept: Arrays, plan: Plan) -> Loader:
        """Features on the devices, as images are up to data.resident_mb, or sent with each batch."""
        if kept.images.nbytes > self.most_bytes:
            return Sent(kept, plan, self.parallel, self.preprocessing)
        return Resident(on_devices(kept, self.parallel), plan, self.parallel, self.preprocessing)

    @property
    def most_bytes(self) -> int:
        """Up to which features are held in memory."""
        return self.config.data.resident_mb * 2**20

    def features(self, source: Source, what: str) -> tuple[np.ndarray, np.ndarray]:
        """The features [N, C] of all images of `source`, perhaps in a file, and which could be read, bool [N]."""
        count, batch_size, parallel = len(source), self.batch_size, self.parallel
        plan = EvalPlan(count, batch_size)
        if isinstance(source, Arrays):  # sent by batches: a set on the devices would be a program for each set
            loader: Loader = Sent(source, plan, parallel, self.preprocessing)
        else:
            workers = self.config.data.workers
            loader = make_loader(
                source, plan, parallel, self.preprocessing, workers=workers, share=parallel.share, bad=self.bad
            )
        features, readable, done = np.empty((0, 0)), np.zeros(count, bool), 0
        found = results(self.step(loader.preprocessing), self.variables, loader)
        try:
            for batch in progress(
                found, enabled=parallel.is_main, desc=f"features for {what}", total=len(plan), unit="batch"
            ):
                rows = slice(done, min(done + batch_size, count))
                if not done:
                    features = self.room((count, batch["features"].shape[1]), batch["features"].dtype)
                features[rows], readable[rows] = (batch[name][: rows.stop - done] for name in ("features", "mask"))
                done = rows.stop
        finally:
            loader.close()
        return features, readable

    @property
    def batch_size(self) -> int:
        """How many images go through the body at once: data.batch_size of them, or a multiple, up to PIXELS."""
        rows, side = self.config.data.batch_size, self.preprocessing.crop_size
        return rows * max(PIXELS // (rows * side * side), 1)

    def step(self, preprocessing: Preprocessing) -> Callable[..., Any]:
        """The compiled step for images of which `preprocessing` is left to do."""
        if preprocessing not in self._steps:
            body = make_features_step(self.model, self.head, preprocessing)
            self._steps[preprocessing] = self.parallel.compile(body, rows=True)
        return self._steps[preprocessing]

    def room(self, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        """An array for features: in memory where they are resident, else in a file without a name, in the user's cache.

        Raises:
          Stop: there is no room.
        """
        size = int(np.prod(shape)) * dtype.itemsize
        if size <= self.most_bytes:
            return np.empty(shape, dtype)
        folder = cache_dir()
        try:
            if isinstance(folder, Path):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder if isinstance(folder, Path) else None) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # now: a full disk would later end the process
                return np.memmap(file, dtype, "r+", shape=shape)
        except OSError as error:
            raise Stop(
                f"{size >> 20} MB of features can't be kept in {folder}: {error.strerror}",
                "make room there, name another place with JAXSFT_CACHE, or set --noconfig.train.keep_features",
            ) from None
