"""Occlusion: how much the logit of a class falls when a window of the image is covered.

Zeiler & Fergus 2014 (arXiv:1311.2901), as captum's Occlusion does it: a pixel's value is the mean over all windows that
cover it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsft.data.augment import normalise
from jaxsft.interpret import baseline
from jaxsft.models.precision import with_products
from jaxsft.models.weights import Preprocessing

SHARE = 8  # of the image's side: the window where none is given, moved by half of it


def usual_window(size: int) -> tuple[int, int]:
    """Window and stride (px) for images of `size` px where none are given: an eighth of the side, half of that."""
    window = max(size // SHARE, 1)
    return window, max(window // 2, 1)


def places(size: int, window: int, stride: int) -> np.ndarray:
    """The upper left corners of all windows, int32 [P, 2]; the last of a row may reach over the edge.

    Raises:
      ValueError: windows that would not cover every pixel, or do not fit.
    """
    if not 0 < window <= size or not 0 < stride <= window:
        raise ValueError(f"a window of {window} px moved by {stride} px does not cover {size} px")
    one = np.arange(-(-(size - window) // stride) + 1, dtype=np.int32) * stride
    return np.stack(np.meshgrid(one, one, indexing="ij"), -1).reshape(-1, 2)


def make(
    model: nn.Module,
    to: Preprocessing,
    window: int,
    stride: int,
    cover: str = "mean",
    matmul_precision: str = "default",
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """A compiled (variables, images [N, S, S, 3] in 0..255, classes int32 [N]) -> attributions float32 [N, S, S].

    Positive: covering the pixel makes the logit fall.

    Args:
      model: applied in evaluation.
      to: mean and deviation of its input, whose size S is `to.crop_size`.
      window: px, the side of a square.
      stride: px from one window to the next, at most `window`.
      cover: what a window is filled with, of `baseline.BASELINES`.
      matmul_precision: as train.matmul_precision.

    Raises:
      ValueError: windows that would not cover every pixel, or do not fit.
    """
    size = to.crop_size
    corners = places(size, window, stride)

    def body(variables: Any, images: jax.Array, classes: jax.Array) -> jax.Array:
        x = normalise(images, to)
        nothing = baseline.make(cover, to).astype(x.dtype)
        row, column = jnp.arange(size)[:, None], jnp.arange(size)[None]

        def logits(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(model.apply(variables, x, train=False), classes[:, None], 1)[:, 0]

        before = logits(x)

        def cover_one(sums: tuple[jax.Array, jax.Array], corner: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            down, right = row - corner[0], column - corner[1]
            covered = (down >= 0) & (down < window) & (right >= 0) & (right < window)
            fall = before - logits(jnp.where(covered[..., None], nothing, x))
            return (sums[0] + fall[:, None, None] * covered, sums[1] + covered), None

        begin = (jnp.zeros(x.shape[:3], before.dtype), jnp.zeros((size, size), before.dtype))
        (total, count), _ = lax.scan(cover_one, begin, jnp.asarray(corners))
        return total / count

    return jax.jit(with_products(body, matmul_precision))
