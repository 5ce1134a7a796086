"""What a network draws at random in training: dropout and stochastic depth, the same for an example wherever it lies.

One key a batch, as Flax's `make_rng` gives it, would make the draws of an example depend on how the batch is divided
over devices and micro-batches. Here every example has a key of its own, [N] of them, and each layer folds in its place
in the network: a checksum of its path. `keys=None` turns all of it off, as evaluation does.
"""

from __future__ import annotations

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

Keys = jax.Array | None  # typed keys of jax.random, one an example, [N]; None: nothing is drawn
MASKS = "masks"  # the collection in which a layer leaves what it drew, for who makes it mutable


def example_keys(key: jax.Array, examples: jax.Array) -> jax.Array:
    """A key for each of the examples, numbers int32 [N] of the data set, of one step's key."""
    return jax.vmap(lambda example: jax.random.fold_in(key, example))(examples)


def keep(keys: jax.Array, path: tuple[str, ...], draw: int, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Bool [N, *shape], True with probability 1 - rate: of a layer's `draw`-th call in a pass."""
    place = zlib.crc32(f"{'/'.join(path)}:{draw}".encode())
    # float32 whatever the network computes in, so that float64 draws the same
    one = lambda key: jax.random.uniform(jax.random.fold_in(key, place), shape, jnp.float32) >= rate
    return jax.vmap(one)(keys)


class Dropout(nn.Module):
    """`torch.nn.Dropout(rate)` of [N, ...]: each value is 0 with probability `rate`, else divided by 1 - rate.

    Srivastava et al. 2014 (JMLR 15).
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, keys: Keys, draw: int = 0) -> jax.Array:
        """`draw` tells several calls of one layer apart."""
        return dropped(self, x, keys, draw, x.shape[1:])


class StochasticDepth(nn.Module):
    """`torchvision.ops.StochasticDepth(rate, "row")` of [N, ...]: an example is 0 with probability `rate`.

    Huang et al. 2016 (arXiv:1603.09382). What is kept is divided by 1 - rate.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, keys: Keys, draw: int = 0) -> jax.Array:
        """`draw` tells several calls of one layer apart."""
        return dropped(self, x, keys, draw, (1,) * (x.ndim - 1))


def dropped(layer: Dropout | StochasticDepth, x: jax.Array, keys: Keys, draw: int, shape: tuple[int, ...]) -> jax.Array:
    """`x` with what the layer drops at 0; of each example `shape` is drawn."""
    if keys is None or layer.rate == 0:
        return x
    kept = keep(keys, layer.path, draw, layer.rate, shape)
    layer.sow(MASKS, "kept", kept)
    if layer.rate == 1:
        return jnp.zeros_like(x)
    return jnp.where(kept, x / (1 - layer.rate), jnp.zeros((), x.dtype))
