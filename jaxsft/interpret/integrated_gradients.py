"""Integrated gradients: how much each value of the input adds to the logit of a class, on the way from a baseline.

Sundararajan et al. 2017 (arXiv:1703.01365). The integral is taken by Gauss-Legendre quadrature, as captum does unless
told otherwise. Attributions sum to what the logit changes by on the way (completeness): by how much they do not is the
error of the quadrature, which more steps make smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsft.data.augment import normalise
from jaxsft.interpret import baseline
from jaxsft.models.precision import with_products
from jaxsft.models.weights import Preprocessing

STEPS = 50  # captum's


class Attributions(NamedTuple):
    """What `make` returns."""

    values: jax.Array  # float32 [N, S, S, 3]: of each value of the normalised image
    logit: jax.Array  # [N]: of the class, for the image
    start: jax.Array  # [N]: the same for the baseline

    def delta(self) -> np.ndarray:
        """How far each image is from completeness, float64 [N]: the sum of its attributions minus the logit's change.

        captum's convergence delta.
        """
        values, logit, start = (np.asarray(part, np.float64) for part in self)
        return values.sum((1, 2, 3)) - (logit - start)


def make(
    model: nn.Module, to: Preprocessing, steps: int = STEPS, start: str = "mean", matmul_precision: str = "default"
) -> Callable[[Any, jax.Array, jax.Array], Attributions]:
    """A compiled (variables, images [N, S, S, 3] in 0..255, classes int32 [N]) -> Attributions.

    Args:
      model: applied in evaluation.
      to: mean and deviation of its input.
      steps: places on the way at which the gradient is taken, one after the other.
      start: the baseline, of `baseline.BASELINES`.
      matmul_precision: as train.matmul_precision.
    """
    places, weights = np.polynomial.legendre.leggauss(steps)
    points = np.stack([(1 + places) / 2, weights / 2], 1)

    def body(variables: Any, images: jax.Array, classes: jax.Array) -> Attributions:
        x = normalise(images, to)
        nothing = jnp.broadcast_to(baseline.make(start, to).astype(x.dtype), x.shape)

        def logits(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(model.apply(variables, x, train=False), classes[:, None], 1)[:, 0]

        def add(total: jax.Array, point: jax.Array) -> tuple[jax.Array, None]:
            gradient = jax.grad(lambda x: logits(x).sum())(nothing + point[0] * (x - nothing))
            return total + point[1] * gradient, None

        total, _ = lax.scan(add, jnp.zeros_like(x), jnp.asarray(points, x.dtype))
        return Attributions(total * (x - nothing), logits(x), logits(nothing))

    return jax.jit(with_products(body, matmul_precision))
