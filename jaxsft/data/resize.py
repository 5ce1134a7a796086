"""Resizing on the device as PIL does it on 8 bits, to the last bit: where a picture is resized changes no pixel of it.

PIL resizes in two passes, along the rows and along the columns. In each a pixel is a sum of pixels by weights in fixed
point, 22 bits behind the point, rounded to a whole level and clipped to 0..255. Which pass comes first changes levels
by one here and there, and depends on PIL's version and on the sizes: PIL itself is asked.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from jaxsft.data.decode import REACH, resampling

BITS = 22  # behind the point: 32 but for 8 of a level and 2 that negative weights need
DIGITS = 3  # of 8 bits that a weight is cut into: any matrix unit multiplies them by a level without rounding
HEIGHT, WIDTH = 1, 2  # axes of a batch


def resize(images: jax.Array, size: tuple[int, int], interpolation: str) -> jax.Array:
    """`PIL.Image.resize` of uint8 images [N, H, W, C] to (height, width): whole levels, float32.

    Sums are exact as long as a pixel is made of up to 257 others in a row, which is a picture 128 times as large.
    """
    x = images.astype(jnp.float32)
    for axis in passes((images.shape[HEIGHT], images.shape[WIDTH]), size, interpolation):
        x = one_pass(x, axis, size[axis - 1], interpolation)
    return x


def one_pass(x: jax.Array, axis: int, side: int, interpolation: str) -> jax.Array:
    """Whole levels [N, H, W, C], float32, with `side` of them along an axis."""
    digits = jnp.asarray(cut(weights(x.shape[axis], side, interpolation)))
    equation = "dos,nswc->dnowc" if axis == HEIGHT else "dos,nhsc->dnhoc"
    sums = jnp.einsum(equation, digits, x, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)
    total = sum((sums[place] << 8 * place for place in range(1, DIGITS)), sums[0])
    return jnp.clip((total + (1 << BITS - 1)) >> BITS, 0, 255).astype(jnp.float32)


def cut(whole: np.ndarray) -> np.ndarray:
    """Numbers [...] in digits of 8 bits [DIGITS, ...], float32, the lowest first; the highest has the sign."""
    digits = [whole >> 8 * place & 255 for place in range(DIGITS - 1)]
    return np.stack([*digits, whole >> 8 * (DIGITS - 1)]).astype(np.float32)


def kernel(x: np.ndarray, interpolation: str) -> np.ndarray:
    """The weight of a pixel that lies `x` steps away: a triangle, or the cubic convolution of Keys with a = -1/2."""
    x = np.abs(x)
    if interpolation == "bilinear":
        return np.maximum(1 - x, 0)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def weights(size: int, out: int, interpolation: str) -> np.ndarray:
    """What each of `size` pixels in a row gives to each of `out`, int64 [out, size], in units of 2**-BITS."""
    step = size / out
    wide = max(step, 1.0)  # where a picture is made smaller the kernel grows with the step: antialiasing
    centres, reach = (np.arange(out) + 0.5)[:, None] * step, REACH[interpolation] * wide
    first, last = (np.trunc(centres + way * reach + 0.5) for way in (-1, 1))
    pixels = np.arange(size)
    found = kernel((pixels - centres + 0.5) * (1 / wide), interpolation)
    found = np.where((pixels >= first) & (pixels < last), found, 0)
    found /= np.cumsum(found, 1)[:, -1:]  # added up in their order, as PIL does
    return np.trunc(found * (1 << BITS) + np.copysign(0.5, found)).astype(np.int64)


@functools.cache
def passes(before: tuple[int, int], after: tuple[int, int], interpolation: str) -> tuple[int, ...]:
    """The axes along which PIL resizes from (height, width) to another, in its order."""
    axes = [axis for axis in (WIDTH, HEIGHT) if before[axis - 1] != after[axis - 1]]
    if len(axes) < 2:
        return tuple(axes)
    probe = np.random.default_rng(0).integers(0, 256, before, np.uint8)
    want = np.asarray(PIL.Image.fromarray(probe).resize(after[::-1], resampling(interpolation)), np.int64)
    orders = [(WIDTH, HEIGHT), (HEIGHT, WIDTH)]
    return min(orders, key=lambda order: int(np.abs(on_host(probe, after, order, interpolation) - want).sum()))


def on_host(image: np.ndarray, size: tuple[int, int], order: tuple[int, ...], interpolation: str) -> np.ndarray:
    """One channel [H, W], resized in passes of an order: int64 (height, width)."""
    x = image.astype(np.int64)
    for axis in order:
        whole = weights(image.shape[axis - 1], size[axis - 1], interpolation).astype(np.float64)  # exact, and in BLAS
        sums = (whole @ x if axis == HEIGHT else x @ whole.T).astype(np.int64)
        x = np.clip((sums + (1 << BITS - 1)) >> BITS, 0, 255)
    return x
