"""Grad-CAM and Grad-CAM++: where on the image the features lie that raise the logit of a class.

Selvaraju et al. 2017 (arXiv:1610.02391) and Chattopadhyay et al. 2018 (arXiv:1710.11063), with the scaling of the
package pytorch-grad-cam, so that a map is the same number for number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.data.augment import normalise
from jaxsft.interpret import feature_map
from jaxsft.interpret.feature_map import FeatureMap
from jaxsft.models.precision import with_products
from jaxsft.models.weights import Preprocessing

SMALL, SMALLEST = 1e-6, 1e-7  # pytorch-grad-cam's, in Grad-CAM++'s and in the scaling's denominator
Step = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def make(
    model: nn.Module, where: FeatureMap, to: Preprocessing, plus_plus: bool = False, matmul_precision: str = "default"
) -> Step:
    """A compiled (variables, images, classes) -> (logits, maps).

    It takes images [N, S, S, 3] in 0..255 of the model's size S, of any dtype, and classes int32 [N], and returns the
    logits [N, K] and maps float32 [N, S, S] in 0..1; 0 everywhere where nothing speaks for the class.

    Args:
      model: applied in evaluation.
      where: the layer, as `feature_map.find` gives it.
      to: mean and deviation of the model's input.
      plus_plus: Grad-CAM++ instead of Grad-CAM.
      matmul_precision: as train.matmul_precision.
    """
    weigh = plus_plus_weights if plus_plus else mean_weights

    def body(variables: Any, images: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = normalise(images, to)

        def score(offset: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            logits, values = feature_map.apply(model, where, variables, x, offset)
            # The sum over images: in evaluation none has a part in another's logits.
            return jnp.take_along_axis(logits, classes[:, None], 1).sum(), (logits, values)

        offset = jnp.zeros((len(images), *where.shape), x.dtype)
        gradients, (logits, values) = jax.grad(score, has_aux=True)(offset)
        features = feature_map.as_image(values, where).astype(x.dtype)
        weights = weigh(features, feature_map.as_image(gradients, where))
        return logits, scaled(jnp.einsum("nhwc,nc->nhw", features, weights, precision="highest"), images.shape[1])

    return jax.jit(with_products(body, matmul_precision))


def mean_weights(features: jax.Array, gradients: jax.Array) -> jax.Array:
    """Grad-CAM's weight of each channel [N, C]: the mean of its gradient over the map [N, H, W, C]."""
    return gradients.mean((1, 2))


def plus_plus_weights(features: jax.Array, gradients: jax.Array) -> jax.Array:
    """Grad-CAM++'s weight of each channel [N, C]: its positive gradients, weighed by equation 19 of the paper."""
    square = gradients**2
    below = 2 * square + features.sum((1, 2), keepdims=True) * square * gradients + SMALL
    alpha = jnp.where(gradients != 0, square / below, 0)
    return (jnp.maximum(gradients, 0) * alpha).sum((1, 2))


def scaled(maps: jax.Array, size: int) -> jax.Array:
    """What speaks for the class in [N, h, w], from 0 to 1 in each image: float32 [N, size, size].

    Scaled before and after it is resized (bilinear), as pytorch-grad-cam does.
    """
    maps = to_one(jnp.maximum(maps, 0))
    maps = jax.image.resize(maps, (len(maps), size, size), "bilinear", antialias=False)
    return to_one(maps).astype(jnp.float32)


def to_one(maps: jax.Array) -> jax.Array:
    """Each of [N, H, W] moved and stretched to 0..1; one that is constant becomes 0."""
    maps = maps - maps.min((1, 2), keepdims=True)
    return maps / (SMALLEST + maps.max((1, 2), keepdims=True))
