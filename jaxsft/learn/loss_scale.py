"""Dynamic loss scaling, without which most gradients of float16 are too small for it and become 0.

Micikevicius et al. 2017 (arXiv:1710.03740), with the numbers of torch.amp.GradScaler: the loss is multiplied by a
scale and the gradients divided by it. An update whose gradients are not finite is left out and the scale halved; after
PERIOD updates without such it is doubled.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

FIRST, PERIOD = 2.0**16, 2000
Scale = dict[str, jax.Array]  # {"scale": float32, "finite": int32 updates in a row} scalars


def create() -> Scale:
    """The scale before the first update."""
    return {"scale": jnp.float32(FIRST), "finite": jnp.int32(0)}


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of every leaf is finite: a bool scalar."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def adjusted(scale: Scale, finite: jax.Array) -> Scale:
    """The scale for the next update, after one whose gradients were `finite` or not."""
    run = jnp.where(finite, scale["finite"] + 1, 0)
    grows = run == PERIOD
    factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5).astype(jnp.float32)
    return {"scale": scale["scale"] * factor, "finite": jnp.where(grows, 0, run)}
