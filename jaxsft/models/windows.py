"""Attention within windows of an image, as Swin Transformers have it, of both versions.

Liu et al. 2021 (arXiv:2103.14030) and 2021 (arXiv:2111.09883). Images are padded with zeros at the right and at the
bottom to whole windows; what is padded is attended to like all else. In every second block the windows lie half a
window further, and wrap around: a mask of -100 keeps pixels from opposite sides apart. Along a side that a single
window covers nothing is shifted.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.models.attention import attend
from jaxsft.models.layers import Linear, at_least_float32
from jaxsft.models.matmul import matmul

HIDDEN = 512  # of the network that makes version 2's bias
MOST = math.log(100)  # what version 2's logit_scale is cut at
TINY = 1e-12  # the norm below which vectors aren't made longer, of torch's normalize
APART = -100.0
drawn = nn.initializers.normal(0.02)  # torch's is truncated at +-2, a hundred deviations away


def relative_index(window: int) -> np.ndarray:
    """int64 [T * T], T = window^2: of every two pixels of a window, the row of the bias table of where they lie."""
    row, column = np.divmod(np.arange(window**2), window)
    down, right = (place[:, None] - place[None, :] + window - 1 for place in (row, column))
    return (down * (2 * window - 1) + right).reshape(-1)


def relative_coordinates(window: int) -> np.ndarray:
    """float32 [1, 2 * window - 1, 2 * window - 1, 2]: distances down and right, on a scale of logarithms.

    In float32 step by step, as torch computes it, bit for bit; a logarithm in float64 is the same on every machine.
    """
    side = np.arange(1 - window, window, dtype=np.float32) / np.float32(window - 1) * np.float32(8)
    logarithm = np.log2((np.abs(side) + np.float32(1)).astype(np.float64)).astype(np.float32)
    side = np.sign(side) * logarithm / np.float32(3)
    return np.stack(np.meshgrid(side, side, indexing="ij"), -1)[None]


def shift_along(shift: int, window: int, side: int) -> int:
    """By how much the windows of a padded side (px) are shifted: not at all where one covers it."""
    return shift if window < side else 0


def apart(height: int, width: int, window: int, shifts: tuple[int, int]) -> np.ndarray:
    """float32 [windows, T, T]: -100 for two pixels of a window that are no neighbours in the image, else 0.

    `height` and `width` (px) are whole windows, shifted down and right by `shifts`.
    """

    def part(side: int, shift: int) -> np.ndarray:
        place = np.arange(side)
        return (place >= side - window).astype(int) + (place >= side - shift) if shift else np.zeros(side, int)

    parts = 3 * part(height, shifts[0])[:, None] + part(width, shifts[1])
    parts = parts.reshape(height // window, window, width // window, window).swapaxes(1, 2).reshape(-1, window**2)
    return np.where(parts[:, :, None] == parts[:, None, :], 0, APART).astype(np.float32)


class QueryKeyValue(nn.Module):
    """A linear layer [..., C] to [..., 3C], queries, keys and values one after the other.

    Without `key_bias` the keys' third of the bias is taken for 0, whatever it is.
    """

    key_bias: bool
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        kernel = self.param("kernel", drawn, (channels, 3 * channels), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (3 * channels,), self.param_dtype)
        if not self.key_bias:
            bias = jnp.asarray(bias).at[channels : 2 * channels].set(0)
        return matmul(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


class WindowAttention(nn.Module):
    """Multi-head attention within windows of [N, H, W, C], to the same: version 1's, by scaled products.

    The bias of two pixels' logits is read from a table by where one lies to the other.
    """

    heads: int
    window: int  # px
    shift: int
    param_dtype: Any

    version = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        (n, height, width, channels), window = x.shape, self.window
        tall, wide = (-(-side // window) * window for side in (height, width))
        shifts = shift_along(self.shift, window, tall), shift_along(self.shift, window, wide)
        if (tall, wide) != (height, width):
            x = jnp.pad(x, ((0, 0), (0, tall - height), (0, wide - width), (0, 0)))
        if any(shifts):
            x = jnp.roll(x, (-shifts[0], -shifts[1]), (1, 2))
        grid = (n, tall // window, window, wide // window, window, channels)
        x = x.reshape(grid).transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, window**2, channels)

        qkv = QueryKeyValue(self.version == 1, self.param_dtype, name="qkv")(x)
        q, k, v = (part.reshape(*x.shape[:3], self.heads, -1) for part in jnp.split(qkv, 3, -1))
        q, k = self.scaled(q, k)
        bias = self.bias(jnp.promote_types(x.dtype, jnp.float32))
        if any(shifts):
            bias = bias + jnp.asarray(apart(tall, wide, window, shifts)[:, None], bias.dtype)
        x = attend(q, k, v, bias).reshape(x.shape)
        x = Linear(channels, drawn, param_dtype=self.param_dtype, name="proj")(x)

        x = x.reshape(n, tall // window, wide // window, window, window, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(n, tall, wide, channels)
        if any(shifts):
            x = jnp.roll(x, shifts, (1, 2))
        return x[:, :height, :width]

    def scaled(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys [N, windows, T, heads, C] as their products are the logits."""
        return q * q.shape[-1] ** -0.5, k

    def bias(self, dtype: Any) -> jax.Array:
        """[heads, T, T] of `dtype`, what is added to the logits."""
        shape = ((2 * self.window - 1) ** 2, self.heads)
        return self.spread(self.param("relative_position_bias_table", drawn, shape, self.param_dtype).astype(dtype))

    def spread(self, table: jax.Array) -> jax.Array:
        """A table [(2 * window - 1)^2, heads] as [heads, T, T]."""
        tokens = self.window**2
        return table[relative_index(self.window)].reshape(tokens, tokens, self.heads).transpose(2, 0, 1)


class WindowAttentionV2(WindowAttention):
    """Version 2's, by cosines times a learnt factor a head; a small network makes the bias of how pixels lie."""

    version = 2

    def scaled(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The cosines' factor goes to the queries."""
        begin = nn.initializers.constant(math.log(10))
        factor = self.param("logit_scale", begin, (self.heads, 1, 1), self.param_dtype)
        factor = at_least_float32(factor.reshape(-1, 1))
        factor = jnp.exp(jnp.where(factor > MOST, MOST, factor))
        return (unit(q) * factor.astype(unit(q).dtype)).astype(q.dtype), unit(k).astype(k.dtype)

    def bias(self, dtype: Any) -> jax.Array:
        """Between 0 and 16."""
        linear = Linear(HIDDEN, drawn, param_dtype=self.param_dtype, name="cpb_mlp.0")
        y = nn.relu(linear(jnp.asarray(relative_coordinates(self.window), dtype)))
        linear = Linear(self.heads, drawn, use_bias=False, param_dtype=self.param_dtype, name="cpb_mlp.2")
        return self.spread(16 * nn.sigmoid(linear(y).reshape(-1, self.heads)))


def unit(x: jax.Array) -> jax.Array:
    """`torch.nn.functional.normalize(x, dim=-1)`, in float32 at least.

    The key of a padded pixel is 0 exactly: of its square, not of its root, there is a gradient.
    """
    x = at_least_float32(x)
    square = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, TINY**2))
