"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899): each image with its partner's, one ratio a step.

As torchvision's `MixUp` and `CutMix`: the ratio and the box are drawn once for the whole batch, here from the step's
key alone, so that every device draws the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mix(
    key: jax.Array, images: jax.Array, partners: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixed images and the share of the first in the labels.

    Args:
      key: of the step.
      images, partners: float32 [N, H, W, 3], normalised.
      mixup, cutmix: alpha of the Beta(alpha, alpha) that the ratio is drawn from; 0 = never. Where both are above 0 a
        coin decides at each step.

    Returns:
      [N, H, W, 3] and a float32 scalar: the loss is share * loss(label) + (1 - share) * loss(partner's label), which
      equals that of the mixed soft labels.
    """
    coin, first, second = jax.random.split(key, 3)
    if not cutmix:
        return mix_up(first, images, partners, mixup)
    if not mixup:
        return cut_mix(second, images, partners, cutmix)
    return jax.lax.cond(
        jax.random.bernoulli(coin),
        lambda: mix_up(first, images, partners, mixup),
        lambda: cut_mix(second, images, partners, cutmix),
    )


def mix_up(key: jax.Array, images: jax.Array, partners: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """share * image + (1 - share) * partner."""
    share = drawn(key, alpha)
    return share * images + (1 - share) * partners, share


def drawn(key: jax.Array, alpha: float) -> jax.Array:
    """A number of Beta(alpha, alpha); `alpha` may be an argument of the compiled step."""
    both = jnp.asarray(alpha, float)
    return jax.random.beta(key, both, both)


def cut_mix(key: jax.Array, images: jax.Array, partners: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """A box of the partner over each image; the share is what of the area is left, after cutting at the border."""
    height, width = images.shape[1:3]
    ratio_key, row_key, column_key = jax.random.split(key, 3)
    reach = 0.5 * jnp.sqrt(1 - drawn(ratio_key, alpha))
    row, column = jax.random.randint(row_key, (), 0, height), jax.random.randint(column_key, (), 0, width)
    half_height, half_width = (reach * height).astype(jnp.int32), (reach * width).astype(jnp.int32)
    top, bottom = jnp.maximum(row - half_height, 0), jnp.minimum(row + half_height, height)
    left, right = jnp.maximum(column - half_width, 0), jnp.minimum(column + half_width, width)
    rows, columns = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return jnp.where(inside, partners, images), share.astype(jnp.float32)
