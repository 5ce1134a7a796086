"""A 2-D convolution that is fast on the CPU too: `lax.conv_general_dilated` elsewhere, the best of four sums there.

XLA:CPU computes a convolution well when its input is large, and badly otherwise: a 3x3 kernel over 2x2 pixels runs in
a scalar loop, a hundred times too slow, and the gradient by the kernel is slow nearly everywhere. The same sums can be
said as matrix products, which XLA:CPU always does well. One core with AVX-512 (165 GFLOP/s at its peak), float32,
GFLOP/s of the direct sum; `winograd` does 2.25 times fewer products, so that it may pass the peak:

| batch, side, channels, stride | forward: xla, winograd, dots | by the kernel: xla, winograd, dots | by the image: xla, ours |
|---|---|---|---|
| 16, 56, 64 -> 64, 1           | 140, 134,  36                |  30,  41, 27                       |  98,   - (winograd)     |
| 16, 28, 128 -> 128, 1         | 144, 193,  59                |  33, 118, 52                       | 145, 172 (winograd)     |
| 16, 14, 256 -> 256, 1         | 147, 239,  88                | 120, 176, 79                       | 141, 227 (winograd)     |
| 16, 7, 512 -> 512, 1          | 125, 173, 104                | 126, 168, 127                      | 113, 162 (winograd)     |
| 64, 16, 64 -> 64, 1           | 163, 132,  83                |  36,  65, 45                       | 164,   - (winograd)     |

On one core of another machine (about 105 at its peak), where dots, which sees the image only, meets the other two:

| batch, side, channels, stride | forward: xla, winograd, dots | by the kernel: xla, winograd, dots | by the image: xla, winograd, dots |
|---|---|---|---|
| 16, 7, 512 -> 512, 1          |  90, 144, 119                |  92, 131, 95                       |  77, 138, 115                     |
| 32, 4, 256 -> 256, 1          |   -, 186, 135                |   -, 162, 116                      |   -, 192, 143                     |
| 32, 2, 512 -> 512, 1          |   -,  90, 142                |   -,  74, 164                      |   -,  82, 160                     |
| 16, 56, 64 -> 128, 2          |  90,   -,  41                |  59,   -, 42                       |  77,   -,  61                     |
| 16, 28, 128 -> 256, 2         |  72,   -,  81                |  65,   -, 84                       |  86,   -,  91                     |
| 16, 14, 256 -> 512, 2         |  82,   -, 101                |  83,   -, 102                      |  79,   -, 109                     |
| 32, 4, 256 -> 512, 2          |   -,   -, 114                |   -,   -, 113                      |   -,   -, 112                     |

In a whole step winograd loses more on small images than here: the transformed kernels, 17 MB for 512 channels, come
from fresh memory. jaxlib 0.10.2 takes its plain convolution from YNNPACK, which with 64 output channels runs in one
thread (98 GFLOP/s on two cores as on one, with 128 channels 188 against 101); on one core winograd made 120 to 161
with 64 channels against 96 to 102, so that it is taken there too.

Tried and dropped: im2col (never ahead of dots by more than noise, but for the few pixels of `_are_few`), Winograd with
4x4 tiles (ten times the rounding error, and its longer transforms eat the gain) and with 2x4 (twice the error, for 3 %
of a ResNet-18's step at 224 px), one batched product instead of sixteen (XLA copies its operands).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsft.models import patches, winograd
from jaxsft.models.matmul import transposed_matmul
from jaxsft.models.parts import sum_of_parts, window
from jaxsft.models.platform import by_platform, vary_like

FEW = 64  # pixels of the output, for which a kernel of WIDE channels is more to move than all that it sees of the image
WIDE = 64


def conv2d(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int = 1) -> jax.Array:
    """Convolve (cross-correlate, as torch) images with a square kernel, with zeros `padding` wide on all four sides.

    The value is `lax.conv_general_dilated`'s to rounding, and exactly that on GPU and TPU. Differentiable once in
    reverse mode by both arguments, keeping `x` and `kernel` for the backward pass, no more. Of second derivatives only
    reverse over reverse exists; forward mode (`jax.jvp`, `jax.hessian`) raises JAX's TypeError about custom_vjp.

    Args:
      x: [N, H, W, C_in] of float32, float64 or bfloat16.
      kernel: [k, k, C_in / groups, C_out] of the same dtype.
      stride: of both directions.
      padding: at least 0.
      groups: of channels, that do not see each other: C_out / groups of the output see C_in / groups of `x`.

    Returns:
      [N, H', W', C_out] of x's dtype, H' = (H + 2 * padding - k) // stride + 1.

    Raises:
      ValueError: when the shapes do not fit each other, or no output is left.
    """
    k = kernel.shape[0]
    if x.ndim != 4 or kernel.ndim != 4 or kernel.shape[1] != k or kernel.shape[2] * groups != x.shape[3]:
        raise ValueError(f"conv2d: kernel {kernel.shape} with {groups} groups does not fit images {x.shape}")
    if min(x.shape[1:3]) + 2 * padding < k:
        raise ValueError(f"conv2d: kernel {kernel.shape} is larger than images {x.shape} padded by {padding}")
    kernel = vary_like(kernel, x)
    if groups > 1:
        from jaxsft.models.grouped import conv2d_grouped  # which is made of what is here

        return conv2d_grouped(x, kernel, stride, padding, groups)
    return _conv2d(x, kernel, stride, padding)


def plain(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    return by_platform(
        x,
        kernel,
        cpu=lambda x, kernel: wide(forward, x.dtype, stride, padding)(x, kernel),
        default=lambda x, kernel: plain(x, kernel, stride, padding),
    )


def _conv2d_fwd(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> tuple[jax.Array, tuple]:
    return _conv2d(x, kernel, stride, padding), (x, kernel)


def _conv2d_bwd(stride: int, padding: int, saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    def cpu(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        by_image = wide(gradient_by_image, x.dtype, stride, padding)(x, kernel, dy)
        return by_image, wide(gradient_by_kernel, x.dtype, stride, padding)(x, kernel, dy)

    def default(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda x, kernel: plain(x, kernel, stride, padding), x, kernel)[1](dy)

    return by_platform(*saved, dy, cpu=cpu, default=default)


_conv2d.defvjp(_conv2d_fwd, _conv2d_bwd)


def wide(function: Callable[..., jax.Array], dtype: Any, *geometry: int) -> Callable[..., jax.Array]:
    """`function` on the CPU computed in float32 at least: bfloat16 is rounded once, at the end."""
    precise = jnp.promote_types(dtype, jnp.float32)
    return lambda *arrays: function(*(a.astype(precise) for a in arrays), *geometry).astype(dtype)


# The rule (numbers above)


def _is_tiny(x_shape: Sequence[int], k_shape: Sequence[int]) -> bool:
    """Whether XLA:CPU may fall back to its scalar loop, for the forward pass or (stride 2) for a gradient."""
    return min(x_shape[1:3]) <= k_shape[0] + 1


def _are_few(x_shape: Sequence[int], k_shape: Sequence[int], stride: int, padding: int) -> bool:
    """Whether so few pixels come out that the kernel is what costs, as of one small image at a network's end.

    One image of 2x2, 512 channels: 2.4 ms; dots, which copies each tap's matrix, 4.1, and more in a network, where the
    copies are fresh memory: a ResNet-18's answer for one image of 64 px took 28 ms with dots and takes 11, at 224 px 66
    and 56. From 64 pixels on both are level, whole networks' too.
    """
    n, (k, _, c_in, c_out) = x_shape[0], k_shape
    if not isinstance(n, int) or k == 1 or min(c_in, c_out) < WIDE:
        return False
    height, width = ((side + 2 * padding - k) // stride + 1 for side in x_shape[1:3])
    return n * height * width <= FEW


@partial(jax.jit, static_argnums=(2, 3))
def forward(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    if patches.lie_side_by_side(kernel.shape, stride, padding):
        return patches.forward(x, kernel)
    if _are_few(x.shape, kernel.shape, stride, padding):
        return _columns(x, kernel, stride, padding)
    if winograd.pays(x.shape, kernel.shape, stride, padding):
        return winograd.forward(x, kernel)
    if kernel.shape[0] == 1 or x.shape[3] >= 128 or _is_tiny(x.shape, kernel.shape):
        return _dots(x, kernel, stride, padding)
    return plain(x, kernel, stride, padding)


@partial(jax.jit, static_argnums=(3, 4))
def gradient_by_image(x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int, padding: int) -> jax.Array:
    if patches.lie_side_by_side(kernel.shape, stride, padding):
        return patches.gradient_by_image(x, kernel, dy)
    if winograd.pays(x.shape, kernel.shape, stride, padding):
        return winograd.forward(dy, kernel, transposed=True)
    if kernel.shape[0] == 1 or (stride > 1 and x.shape[3] >= 16) or _is_tiny(x.shape, kernel.shape):
        return jax.linear_transpose(lambda x: _dots(x, kernel, stride, padding), x)(dy)[0]
    if stride == 1 and padding < kernel.shape[0]:
        # A convolution again, and said so: XLA's own transpose is as fast, but in a lax.scan eight times slower.
        return plain(dy, kernel[::-1, ::-1].swapaxes(2, 3), 1, kernel.shape[0] - 1 - padding)
    return jax.linear_transpose(lambda x: plain(x, kernel, stride, padding), x)(dy)[0]


@partial(jax.jit, static_argnums=(3, 4))
def gradient_by_kernel(x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int, padding: int) -> jax.Array:
    if patches.lie_side_by_side(kernel.shape, stride, padding):
        return patches.gradient_by_kernel(x, kernel.shape[0], dy)
    if winograd.pays(x.shape, kernel.shape, stride, padding):
        return winograd.gradient_by_kernel(x, dy)
    if kernel.shape[0] == 1 or x.shape[3] >= 16 or _is_tiny(x.shape, kernel.shape):
        return _dots_by_kernel(x, kernel.shape[0], dy, stride, padding)
    return _planes_by_kernel(x, kernel.shape[0], dy, stride, padding)


# Sum of dots


def seen_taps(k: int, stride: int, padding: int, size: int) -> list[tuple[int, int, int, int]]:
    """Of each tap along one axis that sees the image: (tap, first output, outputs, first pixel seen)."""
    outputs, taps = (size + 2 * padding - k) // stride + 1, []
    for tap in range(k):
        first = max(-((tap - padding) // stride), 0)
        last = min((size - 1 + padding - tap) // stride, outputs - 1)
        if first <= last:
            taps.append((tap, first, last - first + 1, first * stride + tap - padding))
    return taps


def _dots(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """One matrix product for each tap of the kernel, [pixels, C_in] @ [C_in, C_out], of the pixels that it sees: what
    it sees of the padding is zero, and of 2x2 images a 3x3 kernel sees more padding than image."""
    k, c_in, c_out = kernel.shape[0], *kernel.shape[2:]
    n, h, w, _ = x.shape
    height, width = (h + 2 * padding - k) // stride + 1, (w + 2 * padding - k) // stride + 1
    zero, total = np.zeros((), x.dtype), jnp.zeros((n, height, width, c_out), x.dtype)
    for i, row, rows, top in seen_taps(k, stride, padding, h):
        for j, column, columns, left in seen_taps(k, stride, padding, w):
            part = window(x, top, left, rows, columns, stride).reshape(-1, c_in) @ kernel[i, j]
            border = (row, height - row - rows, 0), (column, width - column - columns, 0)
            total += lax.pad(part.reshape(n, rows, columns, c_out), zero, ((0, 0, 0), *border, (0, 0, 0)))
    return total


def _dots_by_kernel(x: jax.Array, k: int, dy: jax.Array, stride: int, padding: int) -> jax.Array:
    """The transpose of `_dots` by its kernel."""
    c_in, c_out = x.shape[3], dy.shape[3]
    grid = [[jnp.zeros((c_in, c_out), x.dtype)] * k for _ in range(k)]
    for i, row, rows, top in seen_taps(k, stride, padding, x.shape[1]):
        for j, column, columns, left in seen_taps(k, stride, padding, x.shape[2]):
            seen = window(x, top, left, rows, columns, stride).reshape(-1, c_in)
            grid[i][j] = transposed_matmul(seen, window(dy, row, column, rows, columns, 1).reshape(-1, c_out))
    return jnp.stack([jnp.stack(row) for row in grid])


def _columns(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """One matrix product (im2col): what all taps see side by side, [pixels, k * k * C_in], by the kernel as it lies."""
    k, _, c_in, c_out = kernel.shape
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = ((side - k) // stride + 1 for side in x.shape[1:3])
    seen = [window(x, i, j, height, width, stride) for i in range(k) for j in range(k)]
    columns = jnp.concatenate(seen, 3).reshape(-1, k * k * c_in)
    return (columns @ kernel.reshape(-1, c_out)).reshape(x.shape[0], height, width, c_out)


# Few channels in, as in the stem


def _planes_by_kernel(x: jax.Array, k: int, dy: jax.Array, stride: int, padding: int) -> jax.Array:
    """The gradient by a kernel whose C_in is small: each channel as an image of its own, so that what is copied for a
    tap is long rows instead of C_in values at a time. One product for each row of taps.

    Stem, 32 images of 224 px: 34 GFLOP/s, XLA 14, and 33 after a space-to-depth of the image.
    """
    c_in, c_out = x.shape[3], dy.shape[3]

    def some(x: jax.Array, dy: jax.Array) -> jax.Array:
        (n, h, w, _), (_, height, width, _) = x.shape, dy.shape
        extra = (k - 1) // stride
        tall, wide = height + extra, width + extra
        pads = ((0, 0, 0), (padding, tall * stride - h - padding, 0), (padding, wide * stride - w - padding, 0))
        x = lax.pad(x, np.zeros((), x.dtype), (*pads, (0, 0, 0)))
        x = x.reshape(n, tall, stride, wide, stride, c_in).transpose(2, 4, 5, 0, 1, 3)
        x = lax.optimization_barrier(x)  # [stride, stride, C_in, N, tall, wide]: pixels a stride apart side by side
        shift = lambda row, j: x[row, j % stride, :, :, :, j // stride : j // stride + width]
        columns = [jnp.concatenate([shift(row, j) for j in range(k)]) for row in range(min(stride, k))]
        columns = lax.optimization_barrier(columns)  # [k * C_in, N, tall, width]
        cut = lambda i: columns[i % stride][:, :, i // stride : i // stride + height].reshape(k * c_in, -1)
        return jnp.stack([cut(i) @ dy.reshape(-1, c_out) for i in range(k)])

    return sum_of_parts(some, x, dy).reshape(k, k, c_in, c_out)
