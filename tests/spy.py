"""A source that writes down what its process has loaded; for the tests of worker processes."""

from __future__ import annotations

import dataclasses
import os
import sys

import numpy as np

from jaxsft.data.base import Image, Source

HEAVY = ("grain", "torch", "tensorflow", "flax", "tensorflow_datasets", "matplotlib")


@dataclasses.dataclass(frozen=True)
class Spy(Source):
    """`inner`, and in the file $SPY the names of HEAVY modules and whether JAX has touched a device."""

    inner: Source

    @property
    def labels(self) -> np.ndarray:  # type: ignore[override]
        return self.inner.labels

    def __getitem__(self, index: int) -> Image:
        loaded = [name for name in HEAVY if name in sys.modules]
        bridge = sys.modules.get("jax._src.xla_bridge")
        loaded.append("device" if bridge is not None and bridge._backends else "no-device")
        with open(os.environ["SPY"], "a") as file:
            file.write(" ".join(loaded) + "\n")
        return self.inner[index]

    def take(self, indices: np.ndarray) -> Spy:
        return Spy(self.inner.take(indices))
