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
    """A function (variables, images [N, S, S, 3] in 0..255, classes int32 [N]) -> Attributions, compiled once.

    Args:
      model: applied in evaluation.
      to: mean and deviation of its input.
      steps: places on the way at which the gradient is taken.
      start: the baseline, of `baseline.BASELINES`.
      matmul_precision: as train.matmul_precision.
    """
    places, weights = np.polynomial.legendre.leggauss(steps)
    points = [((1 + place) / 2, weight / 2) for place, weight in zip(places, weights, strict=True)]

    def at(variables: Any, images: jax.Array, classes: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logit at a place on the way, 0 to 1, and its gradient times the whole way."""
        x = normalise(images, to)
        nothing = baseline.make(start, to).astype(x.dtype)
        way = x - nothing

        def score(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = jnp.take_along_axis(model.apply(variables, x, train=False), classes[:, None], 1)[:, 0]
            return logits.sum(), logits

        gradient, logits = jax.grad(score, has_aux=True)(nothing + place.astype(x.dtype) * way)
        return logits, gradient * way

    step = jax.jit(with_products(at, matmul_precision))

    # The steps are calls, no loop in the program: on a CPU that took twice the time, and long to compile.
    def attribute(variables: Any, images: jax.Array, classes: jax.Array) -> Attributions:
        (logit, _), (first, whole) = (step(variables, images, classes, np.float64(place)) for place in (1, 0))
        values = jnp.zeros_like(whole)
        for place, weight in points:
            values += float(weight) * step(variables, images, classes, place)[1]
        return Attributions(values, logit, first)

    return attribute
