"""A model that answers many callers at once: bytes of a picture to probabilities, and where the network looked."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.cli import UserError
from jaxsft.data.augment import normalise
from jaxsft.data.threads import cores
from jaxsft.interpret import feature_map, gradcam, metrics, multilabel, overlay
from jaxsft.models.precision import with_products
from jaxsft.models.weights import ModelCard
from jaxsft.ship import picture
from jaxsft.ship.batcher import Batcher, Part
from jaxsft.ship.limits import Limits

MOST_EXPLAINED = 4  # images whose maps are computed together: for the gradient all features stay in memory
MOST_DECODERS = 8  # threads: each may hold the pixels of a whole picture
THRESHOLD = 0.5  # above it a class is a label, of a model of several labels an image


class NoNumbers(Exception):
    """The network computed NaN or infinity."""


class Predictor:
    """A network, compiled for batches of a few sizes, with threads that decode pictures for it.

    `open` compiles, and takes as long as that does; from then on `ready`. `close` ends the threads.
    """

    def __init__(
        self,
        model: nn.Module,
        variables: Any,
        card: ModelCard,
        limits: Limits,
        *,
        step: int = 0,
        upright: bool = True,
        matmul_precision: str = "default",
    ):
        """
        Args:
          model: of the card's architecture.
          variables: {"params", "batch_stats"} on the device that computes.
          card: of the model.
          limits: of what is taken on.
          step: of the checkpoint, to be told.
          upright: turn pictures as their EXIF tag says.
          matmul_precision: as train.matmul_precision.
        """
        self.card, self.limits, self.step = card, limits, step
        self.observers: list[Callable[[int, int, float], None]] = []  # told of each batch, as by `Batcher`
        self._upright = upright
        to, temperature = card.preprocessing, card.temperature
        probabilities_of = (multilabel if card.multi_label else metrics).probabilities_of

        def body(variables: Any, images: jax.Array) -> jax.Array:
            logits = model.apply(variables, normalise(images, to), train=False)
            return probabilities_of(logits.astype(jnp.float32) / temperature)

        compiled = jax.jit(with_products(body, matmul_precision))
        image = Part((to.crop_size, to.crop_size, 3), np.uint8)
        self._classes = Batcher(
            lambda images: np.asarray(compiled(variables, images)),
            (image,),
            max_batch=limits.max_batch,
            max_wait=limits.max_wait,
            queue=limits.queue,
            observe=self._tell,
        )
        self._maps = self._gradcam(model, variables, matmul_precision)
        self._decoders = ThreadPoolExecutor(min(cores(), MOST_DECODERS), "decoder")
        self._opened = threading.Event()

    def _gradcam(self, model: nn.Module, variables: Any, matmul_precision: str) -> Batcher | None:
        """What computes the map of a class; None where the network has no map of the image."""
        to = self.card.preprocessing
        try:
            where = feature_map.find(model, self.card.arch, variables, to.crop_size)
        except UserError:
            return None
        step = gradcam.make(model, where, to, matmul_precision=matmul_precision)
        return Batcher(
            lambda images, classes: np.asarray(step(variables, images, classes)[1]),
            (Part((to.crop_size, to.crop_size, 3), np.uint8), Part((), np.int32)),
            max_batch=min(self.limits.max_batch, MOST_EXPLAINED),
            max_wait=self.limits.max_wait,
            queue=self.limits.queue,
        )

    @property
    def explains(self) -> bool:
        """Whether `map_of` can be asked."""
        return self._maps is not None

    @property
    def ready(self) -> bool:
        """Whether pictures are answered without waiting for a compiler."""
        return self._opened.is_set() and self._classes.alive and (self._maps is None or self._maps.alive)

    @property
    def waiting(self) -> int:
        """Images that wait for the network."""
        return self._classes.waiting

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Images that are computed together, as batches are filled up to."""
        return self._classes.sizes

    def open(self) -> None:
        """Compile for every size of a batch, and start.

        Raises:
          UserError: the network computes no numbers.
        """
        if not np.isfinite(self._classes.warm()).all():
            raise UserError(f"the network of step {self.step} computes no numbers", "take another --checkpoint")
        self._classes.start()
        if self._maps:
            self._maps.warm()
            self._maps.start()
        self._opened.set()

    def close(self, timeout: float | None = None) -> None:
        """Take no more pictures, answer those that wait, and end; wait for that as long as `timeout` seconds."""
        for batcher in filter(None, (self._classes, self._maps)):
            batcher.close(timeout)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def _tell(self, images: int, size: int, seconds: float) -> None:
        for observe in self.observers:
            observe(images, size, seconds)

    def decode(self, content: bytes) -> Future[np.ndarray]:
        """A picture as the network sees it, decoded in a thread; raises as `picture.read`."""
        to = self.card.preprocessing
        return self._decoders.submit(picture.read, content, to, self._upright, self.limits.max_pixels)

    def probabilities(self, image: np.ndarray, deadline: float) -> Future[np.ndarray]:
        """Of each class, float32 [K], computed with those of other callers; raises as `Batcher.submit`."""
        return self._classes.submit(image, deadline=deadline)

    def map_of(self, image: np.ndarray, class_: int, deadline: float) -> Future[np.ndarray]:
        """Grad-CAM of a class: [S, S] in 0..1 of an image as `decode` gives it; raises as `Batcher.submit`."""
        assert self._maps is not None, "see `explains`"
        return self._maps.submit(image, np.asarray(class_, np.int32), deadline=deadline)

    def draw(self, image: np.ndarray, values: np.ndarray) -> Future[bytes]:
        """A map over its image, as a PNG."""
        return self._decoders.submit(png_of, image, values)

    def named(self, probabilities: np.ndarray, topk: int) -> dict[str, Any]:
        """{"classes": [{"class", "probability"}, ...]}, the most probable first, as `python -m jaxsft.predict` has it.

        Of a model of several labels an image also "labels", the names of those above THRESHOLD.

        Raises:
          NoNumbers: a probability is none.
        """
        if not np.isfinite(probabilities).all():
            raise NoNumbers
        names = self.card.names
        best = np.argsort(-probabilities, kind="stable")[:topk]
        found: dict[str, Any] = {"classes": [{"class": names[i], "probability": float(probabilities[i])} for i in best]}
        if self.card.multi_label:
            found["labels"] = [names[i] for i in np.flatnonzero(probabilities > THRESHOLD)]
        return found


def png_of(image: np.ndarray, values: np.ndarray) -> bytes:
    """A map [S, S] in 0..1 over its picture uint8 [S, S, 3], enlarged for people, as the bytes of a PNG."""
    out = io.BytesIO()
    overlay.enlarged(overlay.overlay(image, values)).save(out, "PNG")
    return out.getvalue()
