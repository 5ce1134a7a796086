"""Matrix products that are fast on the CPU too.

XLA:CPU gives a plain product [rows, A] @ [A, B] to YNNPACK and one of a transposed matrix to Eigen. The gradient by the
matrix of a linear layer it makes of several axes of rows by copying one of its operands, turned, in a scalar loop: in a
ConvNeXt's step on two cores these copies took a tenth of the time. Of one axis of rows it copies nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxsft.models.platform import by_platform, vary_like

NARROW = 256  # columns


def matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x @ matrix` of [..., A] and [A, B]. On the CPU in reverse mode only."""
    return by_platform(x, matrix, cpu=_of_rows, default=jnp.matmul)


def _of_rows(x: jax.Array, matrix: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    return _matmul(rows, vary_like(matrix, x)).reshape(*x.shape[:-1], matrix.shape[1])


@jax.custom_vjp
def _matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return x @ matrix


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, matrix = saved
    return dy @ matrix.T, transposed_matmul(x, dy)


_matmul.defvjp(lambda x, matrix: (x @ matrix, (x, matrix)), _backward)


def transposed_matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """x^T y of [rows, A] and [rows, B], a narrow one first: [25088, 256] and [25088, 64] on one core make 76 GFLOP/s
    instead of 49, [6272, 512] and [6272, 128] 94 instead of 52. Without the barrier XLA swaps them back. Of wide ones
    it is 70 instead of 77, [6272, 2048] and [6272, 512], and to turn the result takes the longer the fewer rows."""
    axes = (((0,), (0,)), ((), ()))
    if x.shape[1] <= y.shape[1] or y.shape[1] > NARROW:
        return lax.dot_general(x, y, axes)
    return lax.optimization_barrier(lax.dot_general(y, x, axes)).T
