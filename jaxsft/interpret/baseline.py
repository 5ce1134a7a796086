"""What stands for "nothing there" on an image, which integrated gradients start from and occlusion puts in its place."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsft.data.augment import normalise
from jaxsft.models.weights import Preprocessing

# mean: the mean of the data that the network was trained on, 0 in its input, captum's default.
BASELINES = ("mean", "black", "white")


def make(name: str, to: Preprocessing) -> jax.Array:
    """One pixel of a baseline of BASELINES as the model's input: float32 [3]."""
    if name == "mean":
        return jnp.zeros(3, jnp.float32)
    return normalise(jnp.full(3, 255.0 if name == "white" else 0.0, jnp.float32), to)
