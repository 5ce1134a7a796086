"""A convolution whose windows lie side by side, as a network's cutting of an image into patches: one matrix product.

Its stride is its kernel's side and nothing is padded, so that each pixel is seen once: the image is laid out patch by
patch, [N, H / k, W / k, k * k * C], which the kernel takes as a matrix. What is left over at the right and the bottom
is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def lie_side_by_side(kernel_shape: Sequence[int], stride: int, padding: int) -> bool:
    """Whether this is such a convolution, of more than one pixel."""
    return kernel_shape[0] == stride > 1 and padding == 0


def cut(x: jax.Array, k: int) -> jax.Array:
    """[N, H, W, C] as [N, H // k, W // k, k * k * C]."""
    n, h, w, c = x.shape
    height, width = h // k, w // k
    x = x[:, : height * k, : width * k].reshape(n, height, k, width, k, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height, width, k * k * c)


def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[N, H, W, C] by [k, k, C, D] to [N, H // k, W // k, D]."""
    return cut(x, kernel.shape[0]) @ kernel.reshape(-1, kernel.shape[3])


def gradient_by_image(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """The transpose of `forward` by its image; only the shape of `x` counts."""
    (n, h, w, c), (_, height, width, _), k = x.shape, dy.shape, kernel.shape[0]
    dx = (dy @ kernel.reshape(-1, kernel.shape[3]).T).reshape(n, height, width, k, k, c)
    dx = dx.transpose(0, 1, 3, 2, 4, 5).reshape(n, height * k, width * k, c)
    return jnp.pad(dx, ((0, 0), (0, h - height * k), (0, w - width * k), (0, 0)))


def gradient_by_kernel(x: jax.Array, k: int, dy: jax.Array) -> jax.Array:
    """The transpose of `forward` by its kernel."""
    d_kernel = cut(x, k).reshape(-1, k * k * x.shape[3]).T @ dy.reshape(-1, dy.shape[3])
    return d_kernel.reshape(k, k, x.shape[3], dy.shape[3])
