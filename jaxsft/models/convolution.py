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

from jaxsft.models import patches
from jaxsft.models.matmul import transposed_matmul
from jaxsft.models.platform import by_platform, vary_like

# Winograd's F(2x2, 3x3), Lavin & Gray 2015 (arXiv:1509.09308): a 2x2 tile of outputs from a 4x4 tile of inputs by 16
# products for each pair of channels instead of 36, y = AT [(G g G^T) * (BT d BT^T)] AT^T. All entries are 0, 1, 1/2, so
# that the error stays that of the direct sum: 5e-7 of the largest value in float32 (direct: 3e-7), 1e-15 in float64.
BT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
AT = ((1, 1, 1, 0), (0, 1, -1, -1))
TILE = 2
CACHED = 2**18  # values of an input that are transformed at a time
FEW = 64  # pixels of the output, for which a kernel of WIDE channels is more to move than all that it sees of the image
WIDE = 64
KERNEL_TRANSFORM = 800  # products, for each pair of channels, that take as long as the transform of the kernel


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


def _winograd_pays(x_shape: Sequence[int], k_shape: Sequence[int], stride: int, padding: int) -> bool:
    """Where it multiplies less: of a small image the direct sum need not look at the border, which a tile does."""
    if k_shape[0] != 3 or stride != 1 or padding != 1 or min(k_shape[2:]) < 64:
        return False
    n, h, w, _ = x_shape
    direct, tiles = (3 * h - 2) * (3 * w - 2), -(-h // TILE) * -(-w // TILE)
    saved = direct - 16 * tiles  # products an image, for each pair of channels
    return saved > 0 if not isinstance(n, int) else n * saved > KERNEL_TRANSFORM


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
    if _winograd_pays(x.shape, kernel.shape, stride, padding):
        return _winograd(x, kernel)
    if kernel.shape[0] == 1 or x.shape[3] >= 128 or _is_tiny(x.shape, kernel.shape):
        return _dots(x, kernel, stride, padding)
    return plain(x, kernel, stride, padding)


@partial(jax.jit, static_argnums=(3, 4))
def gradient_by_image(x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int, padding: int) -> jax.Array:
    if patches.lie_side_by_side(kernel.shape, stride, padding):
        return patches.gradient_by_image(x, kernel, dy)
    if _winograd_pays(x.shape, kernel.shape, stride, padding):
        return _winograd(dy, kernel, transposed=True)
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
    if _winograd_pays(x.shape, kernel.shape, stride, padding):
        return _winograd_by_kernel(x, dy)
    if kernel.shape[0] == 1 or x.shape[3] >= 16 or _is_tiny(x.shape, kernel.shape):
        return _dots_by_kernel(x, kernel.shape[0], dy, stride, padding)
    return _planes_by_kernel(x, kernel.shape[0], dy, stride, padding)


# Sum of dots


def window(x: jax.Array, top: int, left: int, height: int, width: int, stride: int) -> jax.Array:
    """[N, height, width, C]: every `stride`-th pixel of `x` from (top, left) on."""
    stop = (x.shape[0], top + (height - 1) * stride + 1, left + (width - 1) * stride + 1, x.shape[3])
    return lax.slice(x, (0, top, left, 0), stop, (1, stride, stride, 1))


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

    return _sum_of_parts(some, x, dy).reshape(k, k, c_in, c_out)


# Winograd


def _combine(matrix: Sequence[Sequence[float]], parts: Sequence[jax.Array]) -> list[jax.Array]:
    """matrix @ parts, spelt out as sums and differences: a product would touch the zeros and ones as well."""

    def total(row: Sequence[float]) -> jax.Array:
        terms = [part if factor == 1 else -part if factor == -1 else factor * part
                 for factor, part in zip(row, parts) if factor]  # fmt: skip
        return sum(terms[1:], terms[0])

    return [total(row) for row in matrix]


def _combine_both(matrix: Sequence[Sequence[float]], grid: Sequence[Sequence[jax.Array]]) -> list[list[jax.Array]]:
    """matrix @ grid @ matrix^T of a square grid of arrays."""
    return [_combine(matrix, row) for row in zip(*(_combine(matrix, column) for column in zip(*grid)))]


def _input_tiles(x: jax.Array) -> tuple[list[list[jax.Array]], int, int]:
    """BT d BT^T of every 4x4 tile, padded by 1 and a step of 2 apart: a 4x4 grid of [N, tall, wide, C]; tall, wide."""
    n, h, w, c = x.shape
    tall, wide = -(-h // TILE), -(-w // TILE)
    x = jnp.pad(x, ((0, 0), (1, tall * TILE + 1 - h), (1, wide * TILE + 1 - w), (0, 0)))
    # Barriers: XLA is not to fuse padding and rows into each of the sixteen consumers and compute them anew there. For the
    # rows jaxlib 0.10.2 does so all the same, and loses nothing: rows that were padded, and so kept, were no faster.
    x = lax.optimization_barrier(x)
    rows = [lax.slice(x, (0, i, 0, 0), (n, i + TILE * tall - 1, x.shape[2], c), (1, TILE, 1, 1)) for i in range(4)]
    rows = lax.optimization_barrier(_combine(BT, rows))
    cut = lambda row, j: lax.slice(row, (0, 0, j, 0), (n, tall, j + TILE * wide - 1, c), (1, 1, TILE, 1))
    return [_combine(BT, [cut(row, j) for j in range(4)]) for row in rows], tall, wide


def interleave(images: Sequence[Sequence[jax.Array]], height: int, width: int) -> jax.Array:
    """The [N, height, width, C] whose pixel (s * u + i, s * v + j) is images[i][j][:, u, v]."""
    n, h, w, c = images[0][0].shape
    s = len(images)
    x = jnp.stack([jnp.stack(row, 3) for row in images], 2)
    return x.reshape(n, s * h, s * w, c)[:, :height, :width]


def _winograd(x: jax.Array, kernel: jax.Array, transposed: bool = False) -> jax.Array:
    """3x3, stride 1, padding 1; `transposed`: with the kernel turned around and its channels swapped (a gradient)."""
    if transposed:
        kernel = kernel[::-1, ::-1]
    taps = _combine_both(G, [[kernel[i, j] for j in range(3)] for i in range(3)])
    # Contract over the kernel's last axis where it is transposed: to swap its axes first was ten times slower.
    axes = (((1,), (1 if transposed else 0,)), ((), ()))

    def some(x: jax.Array) -> jax.Array:
        n, h, w, c = x.shape
        data, tall, wide = _input_tiles(x)
        products = [[lax.dot_general(d.reshape(-1, c), g, axes) for d, g in zip(*pair)] for pair in zip(data, taps)]
        columns = [_combine(AT, column) for column in zip(*products)]
        tiles = lax.optimization_barrier([_combine(AT, row) for row in zip(*columns)])
        return interleave([[tile.reshape(n, tall, wide, -1) for tile in row] for row in tiles], h, w)

    parts = _split(x)
    if len(parts) == 1:
        return some(x)
    y = lax.map(some, parts)
    return y.reshape(x.shape[0], *y.shape[2:])


def _winograd_by_kernel(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The transpose of `_winograd` by its kernel: G^T [(AT^T dy AT) * (BT d BT^T)] G, summed over tiles and images."""
    transposed_at, transposed_g = tuple(zip(*AT)), tuple(zip(*G))

    def some(x: jax.Array, dy: jax.Array) -> jax.Array:
        data, tall, wide = _input_tiles(x)
        _, h, w, _ = dy.shape
        # A row too many: what is padded lies in memory, and that once. Else each of the sixteen sums below cuts its pixels
        # out of the whole batch, three times as slowly (jaxlib 0.10.2 fuses what a barrier is to keep apart).
        dy = jnp.pad(dy, ((0, 0), (0, tall * TILE + 1 - h), (0, wide * TILE - w), (0, 0)))
        corners = [[window(dy, i, j, tall, wide, TILE) for j in range(TILE)] for i in range(TILE)]
        rows = zip(data, _combine_both(transposed_at, corners))
        flat = lambda tile: tile.reshape(-1, tile.shape[-1])
        return jnp.stack([transposed_matmul(flat(d), flat(y)) for row in rows for d, y in zip(*row)])

    total = _sum_of_parts(some, x, dy)
    products = [[total[4 * i + j] for j in range(4)] for i in range(4)]
    return jnp.stack([jnp.stack(row) for row in _combine_both(transposed_g, products)])


def _sum_of_parts(some: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, dy: jax.Array) -> jax.Array:
    """some(x, dy), a sum over images, taken part by part."""
    parts = _split(x)
    if len(parts) == 1:
        return some(x, dy)
    parts_dy = dy.reshape(*parts.shape[:2], *dy.shape[1:])
    shape = jax.eval_shape(some, parts[0], parts_dy[0]).shape
    zero = vary_like(jnp.zeros(shape, x.dtype), x)
    return lax.scan(lambda total, part: (total + some(*part), None), zero, (parts, parts_dy))[0]


def _split(x: jax.Array) -> jax.Array:
    """[parts, images, H, W, C], few enough images a part for what is made of them (4 times as large) to stay in cache.

    For 32 images of 56 x 56 x 64, two at a time instead of all: 134 GFLOP/s forward instead of 67, 71 by the kernel
    instead of 38; for 28 x 28 x 128, 210 instead of 143 and 126 instead of 54. It also keeps their memory small.
    """
    n = x.shape[0]
    if not isinstance(n, int):  # exported for a batch of any size
        return x[None]
    most = max(CACHED, 2 * x.shape[3] ** 2) // (x.size // n)
    images = max(size for size in range(1, n + 1) if n % size == 0 and size <= max(most, 1))
    return x.reshape(n // images, images, *x.shape[1:])
