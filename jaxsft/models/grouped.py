"""A grouped convolution that is fast on the CPU too: sums of shifted images for narrow groups, dense ones for wide.

XLA:CPU computes a grouped convolution in scalar loops, a hundred times too slow for some gradients. Depthwise, and up
to 4 channels a group, it is a sum over taps of the shifted image times a vector of C values, which one fused loop does
without storing a product. Wider groups are dense convolutions one after the other. Milliseconds of one core's time, for
forward, gradient by the image and by the kernel together, float32, 16 images, two cores with AVX2 that other programs
shared; torch 2.14 in the better of its two layouts:

| side, channels, kernel, stride, channels a group |  xla | ours | torch |
|--------------------------------------------------|------|------|-------|
| 24,   96, 7, 1, 1                                |  636 | 13.9 |  16.4 |
|  6,  384, 7, 1, 1                                |  440 |  6.3 |  15.9 |
|  3,  768, 7, 1, 1                                |  465 |  1.4 |  22.5 |
| 48,   96, 3, 2, 1                                |  650 |  8.9 |   7.5 |
| 24,  144, 3, 1, 1                                |  270 |  7.1 |   7.1 |
| 24,  144, 3, 2, 1                                |  245 |  3.6 |   2.7 |
| 12,  240, 5, 1, 1                                |  231 |  6.3 |   8.9 |
|  6,  576, 3, 1, 1                                |  167 |  1.6 |   1.0 |
|  6,  672, 5, 2, 1                                |  315 |  1.3 |   4.3 |
| 24,  128, 3, 1, 4                                |    - | 17.8 |  24.6 |
| 24,  128, 3, 2, 4                                |    - |  6.1 |   6.2 |
| 12,  256, 3, 1, 8                                |    - | 24.5 |  10.1 |
| 12,  512, 3, 2, 16                               |    - | 17.7 |  13.2 |
|  6,  512, 3, 1, 16                               | 2012 | 11.1 |   6.6 |
|  3, 1024, 3, 1, 32                               |  923 | 12.4 |   5.6 |
| 12,  120, 3, 1, 24                               |  326 | 10.3 |   5.8 |
|  6,  528, 3, 1, 264                              |  377 | 44.1 |  78.3 |

Tried and dropped: a reduction for each tap (the gradient by the kernel ten to forty times slower, as XLA:CPU reduces in
scalars), one batched product over groups (five times slower than dense convolutions), the channels of a group turned by
a gather or stored (two to seven times slower), shifted images for 8 channels a group (as fast, twice the compilation).
A value that is not finite may spread to the groups that it is joined with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsft.models import convolution as dense
from jaxsft.models.parts import interleave, window
from jaxsft.models.platform import by_platform, vary_like

SHIFTED = 4  # channels of a group up to which the sum is said as shifted images
JOINED, JOINED_BY_KERNEL = 8, 16  # channels that groups are joined to where the sum is said as dense convolutions
TERMS = 36  # products that one fused loop sums: with more its compilation takes longer, not its run shorter
LARGE = 2**22  # values of an image from which on it is padded part by part: more is fresh memory in every call
# The same for more than TERMS, so that the sum of one loop is in cache when the next one adds to it. And parts are a
# loop, which XLA leaves alone: the last sum of 7x7 taps it gave, with the layer norm after it, to YNNPACK, which wants
# every shifted image in memory (8 images of 56 px, 96 channels, on one core: 91 ms instead of 20).
STORED = 2**18
FUSED = 16  # uses of a value from which on XLA:CPU stores it instead of computing it anew for each of them
BLOCK = 2**13  # values of the gradient by the kernel that one step sums at least, where there are as many images


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv2d_grouped(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
    """`convolution.conv2d` of more than one group: `kernel` varies between devices as `x` does."""
    return by_platform(
        x,
        kernel,
        cpu=lambda x, kernel: dense.wide(_forward, x.dtype, stride, padding, groups)(x, kernel),
        default=lambda x, kernel: dense.plain(x, kernel, stride, padding, groups),
    )


def _fwd(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> tuple[jax.Array, tuple]:
    return conv2d_grouped(x, kernel, stride, padding, groups), (x, kernel)


def _bwd(stride: int, padding: int, groups: int, saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    def cpu(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        by_image = dense.wide(_gradient_by_image, x.dtype, stride, padding, groups)(x, kernel, dy)
        return by_image, dense.wide(_gradient_by_kernel, x.dtype, stride, padding, groups)(x, kernel, dy)

    def default(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda x, kernel: dense.plain(x, kernel, stride, padding, groups), x, kernel)[1](dy)

    return by_platform(*saved, dy, cpu=cpu, default=default)


conv2d_grouped.defvjp(_fwd, _bwd)


# The rule (numbers above)


def _narrow(kernel: jax.Array, groups: int) -> bool:
    return kernel.shape[2] * groups == kernel.shape[3] and kernel.shape[2] <= SHIFTED


def _forward(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
    if _narrow(kernel, groups):
        return _shifted(x, kernel, stride, padding)
    return _each(dense.forward, (x,), kernel, stride, padding, groups)


def _gradient_by_image(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int, padding: int, groups: int
) -> jax.Array:
    if _narrow(kernel, groups):
        return _shifted_by_image(x.shape[1:3], kernel, dy, stride, padding)
    by_image = lambda x, dy, kernel, *geometry: dense.gradient_by_image(x, kernel, dy, *geometry)
    return _each(by_image, (x, dy), kernel, stride, padding, groups)


def _gradient_by_kernel(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int, padding: int, groups: int
) -> jax.Array:
    # A batch of any size, as an exported one has, is not known to consist of the blocks that _shifted_by_kernel sums.
    if _narrow(kernel, groups) and isinstance(x.shape[0], int):
        return _shifted_by_kernel(x, kernel, dy, stride, padding)
    return _each_by_kernel(x, kernel, dy, stride, padding, groups)


# Narrow groups: a sum over taps of the shifted image times a vector, for each channel that a group has


def _turned(x: jax.Array, width: int, turn: int) -> jax.Array:
    """[..., C] whose channel c is channel (c + turn) modulo `width` of the same group of x, whose channels _pad has
    padded. A choice between two shifts of all channels, which runs in vectors; slices of each group, or a gather, are
    copied value by value."""
    if width == 1:
        return x
    c = x.shape[-1] - 2 * width
    shift = lambda by: lax.slice_in_dim(x, width + by, width + by + c, axis=-1)
    return jnp.where(np.arange(c) % width + turn < width, shift(turn), shift(turn - width))


def _diagonals(grid: Sequence[jax.Array], sign: int) -> list[jax.Array]:
    """List whose entry m holds for channel o of a group what entry (m + sign * o) modulo the group's width holds."""
    width = len(grid)
    o = np.arange(grid[0].shape[-1]) % width

    def entry(m: int) -> jax.Array:
        chosen = grid[0]
        for i in range(1, width):
            chosen = jnp.where((m + sign * o) % width == i, grid[i], chosen)
        return chosen

    if width == 1:
        return list(grid)
    stack = lax.optimization_barrier(jnp.stack([entry(m) for m in range(width)]))  # or each use chooses anew
    return [stack[m] for m in range(width)]


def _total(terms: Sequence[jax.Array]) -> jax.Array:
    """The sum, in loops of about equally many, at most TERMS."""
    total, loops = terms[0], -(-len(terms) // TERMS)
    for i, term in enumerate(terms[1:], 1):
        if i * loops // len(terms) != (i - 1) * loops // len(terms):
            total = lax.optimization_barrier(total)
        total += term
    return total


def _pad(x: jax.Array, rows: tuple[int, int], columns: tuple[int, int], width: int) -> jax.Array:
    """With zeros around the image, and for _turned with a group of them on both sides of the channels."""
    channels = (width, width) if width > 1 else (0, 0)
    if not any((*rows, *columns, *channels)):
        return x
    x = lax.pad(x, np.zeros((), x.dtype), ((0, 0, 0), (*rows, 0), (*columns, 0), (*channels, 0)))
    return lax.optimization_barrier(x)  # or each of its uses pads anew


def _border(k: int, stride: int, padding: int, size: int) -> tuple[list[int], tuple[int, int]]:
    """Along one axis: the taps that see the image, and the padding before and after it that these see."""
    taps, outputs = (
        [tap for tap, *_ in dense.seen_taps(k, stride, padding, size)],
        (size + 2 * padding - k) // stride + 1,
    )
    if not taps:
        return [], (0, 0)
    return taps, (max(padding - taps[0], 0), max((outputs - 1) * stride + taps[-1] - padding - size + 1, 0))


def _shifted(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    k, _, width, c = kernel.shape
    n, h, w, _ = x.shape
    height, wide = (h + 2 * padding - k) // stride + 1, (w + 2 * padding - k) // stride + 1
    (rows, above), (columns, before) = _border(k, stride, padding, h), _border(k, stride, padding, w)
    if not rows or not columns:
        return jnp.zeros((n, height, wide, c), x.dtype)
    top, left = above[0] - padding, before[0] - padding
    diagonals = _diagonals([kernel[:, :, i] for i in range(width)], 1)

    def some(x: jax.Array) -> jax.Array:
        x = _pad(x, above, before, width)
        cut = lambda i, j: window(x, top + i, left + j, height, wide, stride)
        turns = [(i, j, m) for m in range(width) for i in rows for j in columns]
        return _total([_turned(cut(i, j), width, m) * diagonals[m][i, j] for i, j, m in turns])

    most = LARGE if len(rows) * len(columns) * width <= TERMS else STORED
    if not isinstance(n, int) or x.size <= most:
        return some(x)
    part = max(size for size in range(1, n + 1) if n % size == 0 and (size == 1 or size * h * w * c <= most))
    return lax.map(some, x.reshape(n // part, part, h, w, c)).reshape(n, height, wide, c)


def _shifted_by_image(size: Sequence[int], kernel: jax.Array, dy: jax.Array, stride: int, padding: int) -> jax.Array:
    """The pixels of each remainder modulo the stride are an image of their own, and see taps of their own."""
    k, _, width, c = kernel.shape
    n, height, wide, _ = dy.shape
    h, w = -(-size[0] // stride), -(-size[1] // stride)  # of the largest of these images

    def seen(rest: int, pixels: int, outputs: int) -> list[tuple[int, int]]:
        """(tap, the output that it gives pixel `rest` to)"""
        pairs = [(tap, (rest + padding - tap) // stride) for tap in range(k) if (rest + padding - tap) % stride == 0]
        return [(tap, shift) for tap, shift in pairs if -pixels < shift < outputs]

    def border(pixels: int, outputs: int) -> tuple[int, int]:
        shifts = [shift for rest in range(stride) for _, shift in seen(rest, pixels, outputs)] or [0]
        return max(-min(shifts), 0), max(max(shifts) + pixels - outputs, 0)

    above, before = border(h, height), border(w, wide)
    dy = _pad(dy, above, before, width)
    # As a convolution of dy its kernel has both channels of a group in the other's place.
    by_output = kernel.reshape(k, k, width, c // width, width).transpose(0, 1, 4, 3, 2).reshape(k, k, width, c)
    diagonals = _diagonals([by_output[:, :, o] for o in range(width)], 1)

    def image(a: int, b: int) -> jax.Array:
        taps = [(*row, *column) for row in seen(a, h, height) for column in seen(b, w, wide)]
        if not taps:
            return jnp.zeros((n, h, w, c), dy.dtype)
        cut = lambda u, v: window(dy, above[0] + u, before[0] + v, h, w, 1)
        turns = [(*tap, m) for m in range(width) for tap in taps]
        return _total([_turned(cut(u, v), width, m) * diagonals[m][i, j] for i, u, j, v, m in turns])

    images = [[image(a, b) for b in range(stride)] for a in range(stride)]
    if stride == 1:
        return images[0][0]
    # The barrier keeps the interleaving from computing in its innermost loop: eight times slower for large images.
    return interleave(lax.optimization_barrier(images), *size)


def _least_divisor(n: int, least: float) -> int:
    return next(size for size in range(1, n + 1) if n % size == 0 and (size >= least or size == n))


def _shifted_by_kernel(x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int, padding: int) -> jax.Array:
    """Every pixel of dy times all that its taps see, a contiguous piece of the image: a step sums the FUSED pixels or
    more of a block of rows, as many products in one loop, that reads but twice and writes nothing for each.

    A sum over pixels for each tap, the transpose of `_shifted`, is a reduction, which XLA:CPU does in scalars.
    """
    k, _, width, c = kernel.shape
    (n, h, w, _), (_, height, wide, _) = x.shape, dy.shape
    (taps_down, above), (taps_right, before) = _border(k, stride, padding, h), _border(k, stride, padding, w)
    if not taps_down or not taps_right:
        return jnp.zeros_like(kernel)
    tall, broad = len(taps_down), len(taps_right)
    # A block: columns, rows and images whose products are summed at once, and images that keep sums of their own.
    columns = max(size for size in range(1, 33) if wide % size == 0)
    rows = _least_divisor(height, FUSED / columns) if columns == wide else 1
    images = _least_divisor(n, FUSED / (rows * columns)) if rows == height and columns == wide else 1
    apart = _least_divisor(n // images, min(BLOCK / (width * tall * broad * c), n // images / 2))
    part = images * apart
    down, right = height // rows, wide // columns
    y_size = (part, rows, columns, c)
    x_size = (part, (rows - 1) * stride + tall, (columns - 1) * stride + broad)
    # Of the first pixel of the image, as the first tap that sees it meets it
    top, left = above[0] + taps_down[0] - padding, before[0] + taps_right[0] - padding

    def images_sum(totals: list[jax.Array], some: tuple[jax.Array, jax.Array]) -> tuple[list[jax.Array], None]:
        x, y, zero = _pad(some[0], above, before, width), some[1], jnp.int32(0)

        def block(index: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
            row, column = lax.div(index, jnp.int32(right)), lax.rem(index, jnp.int32(right))
            start = (zero, row * (rows * stride) + top, column * (columns * stride) + left, zero)
            seen = lax.dynamic_slice(x, start, (*x_size, x.shape[3])).reshape(images, apart, *x_size[1:], -1)
            weights = lax.dynamic_slice(y, (zero, row * rows, column * columns, zero), y_size)
            weights = weights.reshape(images, apart, *y_size[1:])
            for m, i, j in np.ndindex(images, rows, columns):
                piece = seen[m, :, i * stride : i * stride + tall, j * stride : j * stride + broad]
                weight = weights[m, :, i, j, None, None]
                totals = [total + _turned(piece, width, turn) * weight for turn, total in enumerate(totals)]
            return totals

        if down * right == 1:
            return block(zero, totals), None
        return lax.fori_loop(zero, jnp.int32(down * right), block, totals), None

    totals = [vary_like(jnp.zeros((apart, tall, broad, c), x.dtype), x)] * width
    parts = (x.reshape(n // part, part, h, w, c), dy.reshape(n // part, part, height, wide, c))
    totals = [total.sum(0) for total in lax.scan(images_sum, totals, parts)[0]]
    total = jnp.stack(_diagonals(totals, -1), 2)
    unseen = [(taps[0], k - 1 - taps[-1], 0) for taps in (taps_down, taps_right)]
    return lax.pad(total, np.zeros((), total.dtype), (*unseen, (0, 0, 0), (0, 0, 0)))


# Wide groups: dense convolutions one after the other, of as many groups at once as make a matrix product worthwhile


def _joined(kernel_shape: Sequence[int], groups: int, least: int) -> int:
    return _least_divisor(groups, least / min(kernel_shape[2], kernel_shape[3] // groups))


def _major(x: jax.Array, count: int) -> jax.Array:
    """[count, N, H, W, C / count]"""
    return lax.optimization_barrier(jnp.moveaxis(x.reshape(*x.shape[:3], count, -1), 3, 0))


def _each(
    convolve: Callable[..., jax.Array],
    images: Sequence[jax.Array],
    kernel: jax.Array,
    stride: int,
    padding: int,
    groups: int,
) -> jax.Array:
    """convolve(*images, kernel, stride, padding) of the channels of each group, as a loop: a copy of its program for
    each would take a minute to compile."""
    k, _, c_in, c_out = kernel.shape
    joined = _joined(kernel.shape, groups, JOINED)
    split = kernel.reshape(k, k, 1, c_in, groups // joined, joined, c_out // groups)
    own = np.eye(joined, dtype=bool)[:, None, None, :, None]
    # Zero between groups: [blocks, k, k, joined, C_in, joined, C_out]
    blocks = jnp.moveaxis(jnp.where(own, split, 0), 4, 0)
    blocks = blocks.reshape(groups // joined, k, k, joined * c_in, -1)
    parts = [_major(x, groups // joined) for x in images]
    y = jnp.moveaxis(lax.map(lambda part: convolve(*part, stride, padding), (*parts, blocks)), 0, 3)
    return y.reshape(*y.shape[:3], -1)


def _each_by_kernel(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int, padding: int, groups: int
) -> jax.Array:
    k, _, c_in, c_out = kernel.shape
    joined = _joined(kernel.shape, groups, JOINED_BY_KERNEL)
    count = groups // joined
    like = jnp.zeros((k, k, joined * c_in, joined * c_out // groups), kernel.dtype)
    by_kernel = lambda part: dense.gradient_by_kernel(part[0], like, part[1], stride, padding)
    blocks = lax.map(by_kernel, (_major(x, count), _major(dy, count)))
    blocks = blocks.reshape(count, k, k, joined, c_in, joined, c_out // groups)
    own = jnp.stack([blocks[:, :, :, i, :, i] for i in range(joined)], 4)  # [count, k, k, C_in, joined, C_out]
    return jnp.moveaxis(own, 0, 3).reshape(kernel.shape)
