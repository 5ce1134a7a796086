"""Operations on colours and on the plane as torchvision defines them, one image [H, W, 3] in 0..255 at a time.

Each follows `torchvision.transforms.functional` on tensors: of float images by default, of uint8 images with
`whole=True`, where results are cut to whole grey levels as torchvision's cast to uint8 does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

GREY = (0.2989, 0.587, 0.114)  # of R, G, B


def clip_levels(image: jax.Array, whole: bool) -> jax.Array:
    """Clipped to 0..255, and cut to whole levels where `whole`."""
    image = jnp.clip(image, 0, 255)
    return jnp.floor(image) if whole else image


def blend(image: jax.Array, other: jax.Array, amount: jax.Array, whole: bool = False) -> jax.Array:
    """amount * image + (1 - amount) * other."""
    return clip_levels(amount * image + (1 - amount) * other, whole)


def grey(image: jax.Array, whole: bool = False) -> jax.Array:
    """Luma, [H, W, 1]."""
    red, green, blue = (weight * image[..., i : i + 1] for i, weight in enumerate(GREY))
    luma = red + green + blue
    return jnp.floor(luma) if whole else luma


def mean_level(levels: jax.Array) -> jax.Array:
    """The mean of levels 0..255, [H, W, 1], to 1/256 of each, in whole numbers: the order of summing does not matter.

    A float mean differs in its last bit with how XLA splits the sum, which depends on the images a device has.
    """
    rows = jnp.round(levels[..., 0] * 256).astype(jnp.int32).sum(1)  # up to 2**15 px wide
    high, low = (rows >> 12).sum(), (rows & 4095).sum()
    return (high.astype(jnp.float32) * 4096 + low) / (256 * levels.size)


def brightness(image: jax.Array, amount: jax.Array, whole: bool = False) -> jax.Array:
    """`adjust_brightness`: 0 is black, 1 the image."""
    return blend(image, jnp.zeros_like(image), amount, whole)


def contrast(image: jax.Array, amount: jax.Array, whole: bool = False) -> jax.Array:
    """`adjust_contrast`: 0 is a grey of the mean luma, 1 the image."""
    return blend(image, mean_level(grey(image, whole)), amount, whole)


def saturation(image: jax.Array, amount: jax.Array, whole: bool = False) -> jax.Array:
    """`adjust_saturation`: 0 is a grey picture, 1 the image."""
    return blend(image, grey(image, whole), amount, whole)


def hue(image: jax.Array, turn: jax.Array, whole: bool = False) -> jax.Array:
    """`adjust_hue`: colours turned by `turn` of the circle, -0.5 to 0.5; through HSV and back."""
    x = image / 255
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    high, low = x.max(-1), x.min(-1)
    span = high - low
    flat = span == 0
    saturated = span / jnp.where(flat, 1, high)
    r, g, b = ((high - channel) / jnp.where(flat, 1, span) for channel in (red, green, blue))
    sector = jnp.where(high == red, b - g, jnp.where(high == green, 2 + r - b, 4 + g - r))
    angle = (sector / 6 + 1 + turn) % 1
    # From HSV: each channel is high - high * saturation * a trapezoid of the angle (the closed form of the six cases).
    offsets = jnp.asarray([5.0, 3.0, 1.0])
    k = (offsets + angle[..., None] * 6) % 6
    shape = jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
    out = high[..., None] * (1 - saturated[..., None] * shape) * 255
    return clip_levels(jnp.round(out) if whole else out, whole)


def sharpness(image: jax.Array, amount: jax.Array, whole: bool = False) -> jax.Array:
    """`adjust_sharpness`: 0 is it smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13, 1 the image."""
    height, width = image.shape[:2]
    if height < 3 or width < 3:
        return image
    rows = image[:-2] + image[1:-1] + image[2:]
    nine = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    inner = (nine + 4 * image[1:-1, 1:-1]) / 13
    smooth = image.at[1:-1, 1:-1].set(jnp.round(inner) if whole else inner)
    return blend(image, smooth, amount, whole)


def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
    """`posterize` of whole levels: the upper `bits` bits of each."""
    step = 2.0 ** (8 - bits)
    return jnp.floor(image / step) * step


def solarize(image: jax.Array, threshold: jax.Array) -> jax.Array:
    """`solarize`: levels from `threshold` on are inverted."""
    return jnp.where(image >= threshold, 255 - image, image)


def autocontrast(image: jax.Array) -> jax.Array:
    """`autocontrast` of whole levels: each channel stretched to 0..255."""
    low, high = image.min((0, 1)), image.max((0, 1))
    flat = low == high
    scale = 255 / jnp.where(flat, 1, high - low)
    return clip_levels(jnp.where(flat, image, (image - low) * scale), whole=True)


def equalize(image: jax.Array) -> jax.Array:
    """`equalize` of whole levels: each channel's histogram made even."""

    def channel(levels: jax.Array) -> jax.Array:
        levels = levels.astype(jnp.int32)
        counts = jnp.zeros(256, jnp.int32).at[levels.reshape(-1)].add(1)
        last = counts[255 - jnp.argmax(counts[::-1] > 0)]
        step = (levels.size - last) // 255
        table = (jnp.cumsum(counts) + step // 2) // jnp.maximum(step, 1)
        table = jnp.clip(jnp.concatenate([jnp.zeros(1, jnp.int32), table[:-1]]), 0, 255)
        return jnp.where(step == 0, levels, table[levels])

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image).astype(image.dtype)


def affine(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """`affine` with the nearest pixel and black outside.

    Args:
      image: [H, W, 3].
      matrix: [2, 3], from output to input coordinates (x, y, 1), counted from the middle of the image.
    """
    height, width = image.shape[:2]
    x = jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2
    y = jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2
    column = matrix[0, 0] * x + matrix[0, 1] * y[:, None] + matrix[0, 2] + (width - 1) / 2
    row = matrix[1, 0] * x + matrix[1, 1] * y[:, None] + matrix[1, 2] + (height - 1) / 2
    column, row = jnp.round(column).astype(jnp.int32), jnp.round(row).astype(jnp.int32)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixels = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
    return jnp.where(inside[..., None], pixels, 0)
