"""Random crops and erased boxes as torchvision samples them, in pure JAX, one image [H, W, 3] at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

TRIES = 10  # torchvision's, before it falls back
Box = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # top, left, height, width
Kernel = Callable[[jax.Array], jax.Array]  # distance, 0 or more, in steps of the kernel -> weight


def sample_crop(
    key: jax.Array, height: jax.Array, width: jax.Array, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """`RandomResizedCrop.get_params`: the box to cut out of an image of (height, width) px, as float32 whole numbers.

    Ten tries at a box of area U(scale) and an aspect ratio whose logarithm is uniform; else the middle, as large as
    `ratio` allows.
    """
    h, w, fits, offsets = boxes(key, height, width, scale, ratio)
    fits = fits & (h <= height) & (w <= width)
    first = jnp.argmax(fits)
    whole = width / height
    middle_w = jnp.where(whole > ratio[1], jnp.round(height * ratio[1]), width)
    middle_h = jnp.where(whole < ratio[0], jnp.round(width / ratio[0]), height)
    found = fits.any()
    h = jnp.where(found, h[first], middle_h)
    w = jnp.where(found, w[first], middle_w)
    top = jnp.where(found, jnp.floor(offsets[0, first] * (height - h + 1)), (height - h) // 2)
    left = jnp.where(found, jnp.floor(offsets[1, first] * (width - w + 1)), (width - w) // 2)
    return top, left, h, w


def boxes(
    key: jax.Array, height: jax.Array, width: jax.Array, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """TRIES boxes: heights, widths, whether they have any pixels, and uniform numbers [2, TRIES] for their place."""
    keys = jax.random.split(key, 3)
    area = height * width * jax.random.uniform(keys[0], (TRIES,), minval=scale[0], maxval=scale[1])
    log_low, log_high = jnp.log(jnp.asarray(ratio))
    aspect = jnp.exp(jax.random.uniform(keys[1], (TRIES,), minval=log_low, maxval=log_high))
    w, h = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    return h, w, (h > 0) & (w > 0), jax.random.uniform(keys[2], (2, TRIES))


def triangle(x: jax.Array) -> jax.Array:
    """The kernel of bilinear interpolation, which reaches 1."""
    return jnp.maximum(1 - x, 0)


def keys_cubic(x: jax.Array) -> jax.Array:
    """Keys' kernel of bicubic interpolation with a = -0.5, which reaches 2: torch's with antialiasing, and PIL's.

    In factors, for the terms of the polynomials cancel near 1 and 2: at the edge of a box all weights may be so small,
    and are divided by their sum.
    """
    near = (1 - x) * (1 + x - 1.5 * x**2)
    far = -0.5 * (x - 1) * (x - 2) ** 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


KERNELS: Mapping[str, Kernel] = MappingProxyType({"bilinear": triangle, "bicubic": keys_cubic})  # by interpolation


def resize_matrix(start: jax.Array, length: jax.Array, size: int, out: int, kernel: Kernel) -> jax.Array:
    """Weights [out, size] that resize the pixels `start` .. `start` + `length` of `size` to `out`.

    Antialiased as torch's `interpolate(antialias=True)` and PIL: a kernel as wide as the step between outputs, at least
    one pixel, over the pixels of the box alone. Those are the pixels whose centre lies in it; a box that is so narrow
    that it holds none, as on a canvas, takes for each output the pixel in which that lies.
    """
    step = length / out
    centre = start + (jnp.arange(out) + 0.5) * step
    pixel = jnp.arange(size) + 0.5
    weight = kernel(jnp.abs(pixel - centre[:, None]) / jnp.maximum(step, 1))
    weight = jnp.where((pixel > start) & (pixel < start + length), weight, 0)
    nearest = jnp.arange(size) == jnp.clip(jnp.floor(centre), 0, size - 1)[:, None]
    weight = jnp.where(weight.sum(1, keepdims=True) > 0, weight, nearest)
    return weight / weight.sum(1, keepdims=True)


def crop_resize(image: jax.Array, box: Box, out: int, interpolation: str) -> jax.Array:
    """The box of an image as torchvision's `resized_crop` with antialiasing: float32 [out, out, 3], clipped to 0..255.

    Bounds, in grey levels of 0..255, for images of up to 500 px: it is torchvision's of float tensors within 2.5e-3
    (bilinear) or 3e-3 (bicubic) on pictures, 1e-2 or 1.2e-2 on noise. Of 8-bit PIL images it is as far as
    `augment.preprocess`: 1 (bilinear), 1.125 (bicubic where nothing is clipped), 10 on photographs, 26 on noise.

    Args:
      image: float32 [H, W, 3] in 0..255.
      box: in its px, fractions too.
      out: px.
      interpolation: one of KERNELS.
    """
    top, left, height, width = box
    kernel = KERNELS[interpolation]
    rows = resize_matrix(top, height, image.shape[0], out, kernel)
    columns = resize_matrix(left, width, image.shape[1], out, kernel)
    x = jnp.einsum("oh,hwc->owc", rows, image, precision="highest")
    x = jnp.einsum("pw,owc->opc", columns, x, precision="highest")
    return jnp.clip(x, 0, 255)  # bicubic interpolation overshoots


def random_resized_crop(
    key: jax.Array,
    image: jax.Array,
    size: jax.Array | None,
    out: int,
    interpolation: str,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
    """`RandomResizedCrop(out, scale, ratio, interpolation)` of one image: [out, out, 3], within `crop_resize`'s bounds.

    Args:
      key: of this example and step.
      image: float32 [H, W, 3] in 0..255.
      size: None, or int32 [4] where the picture lies on a canvas: (height, width) of the original, in which the box is
        sampled, and (rows, columns) that it takes; upright pictures lie with rows and columns swapped.
      out: px.
      interpolation: one of KERNELS.
      scale, ratio: as torchvision's.
    """
    if size is None:
        height, width = (jnp.float32(side) for side in image.shape[:2])
        return crop_resize(image, sample_crop(key, height, width, scale, ratio), out, interpolation)
    height, width, rows, columns = size.astype(jnp.float32)
    top, left, h, w = sample_crop(key, height, width, scale, ratio)
    turned = height > width
    across, down = jnp.where(turned, width, height), jnp.where(turned, height, width)  # of the original, on the canvas
    first = jnp.where(turned, jnp.stack([left, w]), jnp.stack([top, h])) * rows / across
    second = jnp.where(turned, jnp.stack([top, h]), jnp.stack([left, w])) * columns / down
    x = crop_resize(image, (first[0], second[0], first[1], second[1]), out, interpolation)
    return jnp.where(turned, x.swapaxes(0, 1), x)


def random_erasing(
    key: jax.Array,
    image: jax.Array,
    probability: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> jax.Array:
    """`RandomErasing(probability, scale, ratio, value=0)` of one normalised image [H, W, 3] (arXiv:1708.04896)."""
    height, width = image.shape[:2]
    chosen, place = jax.random.split(key)
    w, h, _, offsets = boxes(place, jnp.float32(height), jnp.float32(width), scale, ratio)  # its aspect is height/width
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits)
    h, w = h[first], w[first]
    top = jnp.floor(offsets[0, first] * (height - h + 1))
    left = jnp.floor(offsets[1, first] * (width - w + 1))
    row, column = jnp.arange(height)[:, None], jnp.arange(width)[None]
    inside = (row >= top) & (row < top + h) & (column >= left) & (column < left + w)
    inside &= fits.any() & jax.random.bernoulli(chosen, probability)
    return jnp.where(inside[..., None], 0, image)
