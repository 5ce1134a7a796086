"""Pooling with torch's numerics, on images [N, H, W, C]."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsft.models.layers import at_least_float32
from jaxsft.models.platform import by_platform

STRIDE = 2


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def max_pool(x: jax.Array, kernel_size: int = 3, padding: int = 1) -> jax.Array:
    """`torch.nn.MaxPool2d(3, stride=2, padding=1)`, or (2, 2, 0): the border counts as -inf, not as zero.

    Of equal values in a window the first in row-major order gets the gradient, as in torch and in XLA. XLA's own
    operation runs on TPUs. On the CPU its two loops took a tenth of a train step, and are sums of slices here. On a GPU
    its gradient writes four indices of each maximum, and adds to memory in no fixed order; here the forward pass keeps
    which tap it was, in a byte, and each pixel asks the windows that see it: 1.2 GB less of a ResNet-50's 45. That
    costs a TPU more than it saves. Reverse mode only.
    """
    ours = lambda x: _first_maximum(x, kernel_size, padding)[0]
    return by_platform(x, tpu=partial(_max_pool_plain, k=kernel_size, padding=padding), default=ours)


def _max_pool_plain(x: jax.Array, k: int, padding: int) -> jax.Array:
    return nn.max_pool(x, (k, k), strides=(STRIDE, STRIDE), padding=((padding, padding), (padding, padding)))


def _first_maximum(x: jax.Array, k: int, padding: int) -> tuple[jax.Array, jax.Array]:
    """The maximum of each window and which of its taps, counted row by row, holds it first."""
    n, h, w, c = x.shape
    height, width = (h + 2 * padding - k) // STRIDE + 1, (w + 2 * padding - k) // STRIDE + 1
    if padding:
        border = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        x = jnp.pad(x, border, constant_values=-jnp.inf)
        # On the CPU every slice pads anew without.
        x = by_platform(x, cpu=lax.optimization_barrier, default=lambda x: x)
    best, first = jnp.full((n, height, width, c), -jnp.inf, x.dtype), jnp.zeros((n, height, width, c), jnp.int8)
    for tap in range(k * k):
        i, j = divmod(tap, k)
        value = lax.slice(x, (0, i, j, 0), (n, i + 2 * height - 1, j + 2 * width - 1, c), (1, STRIDE, STRIDE, 1))
        first = jnp.where(value > best, jnp.int8(tap), first)
        best = jnp.maximum(best, value)
    return best, first


def _gradient_by_taps(x: jax.Array, dy: jax.Array, k: int, padding: int) -> jax.Array:
    """The sum over the taps of a window, each spread over the image: XLA:GPU makes it in the kernel that asks for it.

    It finds the taps in the forward pass too, and does not look for them twice.
    """
    (_, h, w, _), (height, width) = x.shape, dy.shape[1:3]
    first, zero, dx = _first_maximum(x, k, padding)[1], jnp.zeros((), dy.dtype), jnp.zeros_like(x)
    for tap in range(k * k):
        row, column = (place - padding for place in divmod(tap, k))
        down = row, h - row - (STRIDE * (height - 1) + 1), STRIDE - 1
        right = column, w - column - (STRIDE * (width - 1) + 1), STRIDE - 1
        dx += lax.pad(jnp.where(first == tap, dy, zero), zero, ((0, 0, 0), down, right, (0, 0, 0)))
    return dx


def _gradient_by_pixels(x: jax.Array, dy: jax.Array, k: int, padding: int) -> jax.Array:
    """Each of the four pixels of a 2x2 cell collects from the windows that see it, one, two or four."""
    n, h, w, c = x.shape
    height, width = dy.shape[1:3]
    after = ((0, 0), (0, 1), (0, 1), (0, 0))
    dy, first = lax.optimization_barrier((jnp.pad(dy, after), jnp.pad(_first_maximum(x, k, padding)[1], after)))
    # Pixel 2u + p is tap 2u + p + padding - 2v of window v.
    taps = [[(p + padding - 2 * v, v) for v in (0, 1) if 0 <= p + padding - 2 * v < k] for p in (0, 1)]

    def collect(row: int, column: int) -> jax.Array:
        total = jnp.zeros((n, height, width, c), dy.dtype)
        for i, down in taps[row]:
            for j, right in taps[column]:
                window = (slice(None), slice(down, down + height), slice(right, right + width))
                total += jnp.where(first[window] == k * i + j, dy[window], 0)
        return total

    dx = jnp.stack([jnp.stack([collect(row, column) for column in (0, 1)], 3) for row in (0, 1)], 2)
    dx = dx.reshape(n, 2 * height, 2 * width, c)[:, :h, :w]
    # Without padding the last pixel of an odd side lies in no window.
    return jnp.pad(dx, ((0, 0), (0, h - dx.shape[1]), (0, w - dx.shape[2]), (0, 0)))


def _max_pool_bwd(k: int, padding: int, x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    plain = lambda x, dy: jax.vjp(partial(_max_pool_plain, k=k, padding=padding), x)[1](dy)[0]
    by_pixels, by_taps = (partial(form, k=k, padding=padding) for form in (_gradient_by_pixels, _gradient_by_taps))
    return (by_platform(x, dy, cpu=by_pixels, tpu=plain, default=by_taps),)


max_pool.defvjp(lambda x, k, padding: (max_pool(x, k, padding), x), _max_pool_bwd)


class MaxPool(nn.Module):
    """`max_pool` as a module, where what it gives is to be found by torch's name of it."""

    kernel_size: int = 3
    padding: int = 1

    def __call__(self, x: jax.Array) -> jax.Array:
        return max_pool(x, self.kernel_size, self.padding)


def average_pool(x: jax.Array) -> jax.Array:
    """`torch.nn.AvgPool2d(2, stride=2)`: the last pixel of an odd side is left out."""
    n, h, w, c = x.shape
    cells = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    return cells.mean((2, 4))


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """`torch.nn.AdaptiveAvgPool2d(size)` to [N, size, size, C]: bin i of a side of S pixels is the mean of pixels
    floor(i S / size) up to ceil((i + 1) S / size), so that bins overlap, and repeat pixels where S < size."""

    def bins(side: int) -> np.ndarray:
        matrix = np.zeros((size, side))
        for i in range(size):
            start, stop = i * side // size, -(-(i + 1) * side // size)
            matrix[i, start:stop] = 1 / (stop - start)
        return matrix

    dtype, (_, h, w, _) = x.dtype, x.shape
    if (h, w) == (size, size):
        return x
    x = at_least_float32(x)
    rows, columns = jnp.asarray(bins(h), x.dtype), jnp.asarray(bins(w), x.dtype)
    return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, x, precision=lax.Precision.HIGHEST).astype(dtype)


def global_average_pool(x: jax.Array) -> jax.Array:
    """`AdaptiveAvgPool2d(1)` and `flatten`: [N, H, W, C] to [N, C], in float32 at least."""
    return at_least_float32(x).mean((1, 2))
