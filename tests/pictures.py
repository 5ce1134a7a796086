"""Sources for the tests of the loader; what is here is loaded in worker processes, so it imports little."""

from __future__ import annotations

import dataclasses
import os
import sys

import numpy as np
import PIL.Image

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

    def select(self, indices: np.ndarray) -> Spy:
        return Spy(self.inner.select(indices))


@dataclasses.dataclass(frozen=True)
class Pictures(Source):
    """Photographs of several sizes, made when asked for."""

    labels: np.ndarray
    class_names: tuple[str, ...] = ("a", "b")
    size: tuple[int, int] | None = None

    def __getitem__(self, index: int) -> PIL.Image.Image:
        shape = self.size or ((60, 80), (90, 50), (64, 64))[index % 3]
        return PIL.Image.fromarray(np.random.default_rng(index).integers(0, 256, (*shape, 3), np.uint8))

    def select(self, indices: np.ndarray) -> Pictures:
        raise NotImplementedError
