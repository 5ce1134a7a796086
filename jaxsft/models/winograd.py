"""A 3x3 convolution of stride 1 by Winograd's F(2x2, 3x3): fewer products, said as matrix products.

Lavin & Gray 2015 (arXiv:1509.09308). A 2x2 tile of outputs comes of a 4x4 tile of inputs by 16 products for each pair
of channels instead of 36, y = AT [(G g G^T) * (BT d BT^T)] AT^T. All entries are 0, 1, 1/2, so that the error stays
that of the direct sum: 5e-7 of the largest value in float32 (direct: 3e-7), 1e-15 in float64. convolution.py says where
it pays.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxsft.models.matmul import transposed_matmul
from jaxsft.models.parts import interleave, split, sum_of_parts, window

BT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
AT = ((1, 1, 1, 0), (0, 1, -1, -1))
TILE = 2
KERNEL_TRANSFORM = 800  # products, for each pair of channels, that take as long as the transform of the kernel


def pays(x_shape: Sequence[int], k_shape: Sequence[int], stride: int, padding: int) -> bool:
    """Where it multiplies less: of a small image the direct sum need not look at the border, which a tile does."""
    if k_shape[0] != 3 or stride != 1 or padding != 1 or min(k_shape[2:]) < 64:
        return False
    n, h, w, _ = x_shape
    direct, tiles = (3 * h - 2) * (3 * w - 2), -(-h // TILE) * -(-w // TILE)
    saved = direct - 16 * tiles  # products an image, for each pair of channels
    return saved > 0 if not isinstance(n, int) else n * saved > KERNEL_TRANSFORM


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
    # Barriers: XLA is not to fuse padding and rows into each of the sixteen consumers and compute them anew there. For
    # the rows jaxlib 0.10.2 does so all the same, and loses nothing: padded rows, which are kept, were no faster.
    x = lax.optimization_barrier(x)
    rows = [lax.slice(x, (0, i, 0, 0), (n, i + TILE * tall - 1, x.shape[2], c), (1, TILE, 1, 1)) for i in range(4)]
    rows = lax.optimization_barrier(_combine(BT, rows))
    cut = lambda row, j: lax.slice(row, (0, 0, j, 0), (n, tall, j + TILE * wide - 1, c), (1, 1, TILE, 1))
    return [_combine(BT, [cut(row, j) for j in range(4)]) for row in rows], tall, wide


def forward(x: jax.Array, kernel: jax.Array, transposed: bool = False) -> jax.Array:
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

    parts = split(x)
    if len(parts) == 1:
        return some(x)
    y = lax.map(some, parts)
    return y.reshape(x.shape[0], *y.shape[2:])


def gradient_by_kernel(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The transpose of `forward` by its kernel: G^T [(AT^T dy AT) * (BT d BT^T)] G, summed over tiles and images."""
    transposed_at, transposed_g = tuple(zip(*AT)), tuple(zip(*G))

    def some(x: jax.Array, dy: jax.Array) -> jax.Array:
        data, tall, wide = _input_tiles(x)
        _, h, w, _ = dy.shape
        # A row too many: what is padded lies in memory, and that once. Else each of the sixteen sums below cuts its
        # pixels out of the whole batch, three times as slowly (jaxlib 0.10.2 fuses what a barrier is to keep apart).
        dy = jnp.pad(dy, ((0, 0), (0, tall * TILE + 1 - h), (0, wide * TILE - w), (0, 0)))
        corners = [[window(dy, i, j, tall, wide, TILE) for j in range(TILE)] for i in range(TILE)]
        rows = zip(data, _combine_both(transposed_at, corners))
        flat = lambda tile: tile.reshape(-1, tile.shape[-1])
        return jnp.stack([transposed_matmul(flat(d), flat(y)) for row in rows for d, y in zip(*row)])

    total = sum_of_parts(some, x, dy)
    products = [[total[4 * i + j] for j in range(4)] for i in range(4)]
    return jnp.stack([jnp.stack(row) for row in _combine_both(transposed_g, products)])
