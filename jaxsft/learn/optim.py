"""From the config to one optax chain, with torch's arithmetic.

SGD is `clip -> add weight decay to the gradient -> momentum trace -> rate`: torch's order (Sutskever's form differs:
there the rate is inside the buffer).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from jaxsft.learn import trainable
from jaxsft.learn.schedule import Schedule


def make_optimizer(config: ConfigDict, params: Any, rate: Schedule) -> optax.GradientTransformation:
    """The optimizer of the config for parameters shaped like `params`.

    Raises:
      UserError: a pattern of model.freeze or optim.lr_multipliers that matches no parameter, or everything is frozen.
    """
    frozen = trainable.frozen_parameters(config, params)

    chain = optax.chain(
        clip_by_norm(config.optim.clip_norm) if config.optim.clip_norm else optax.identity(),
        *update_rule(config, rate),
        scale_by_path(lambda path: trainable.lr_multiplier(config, path, frozen)),
    )
    if not any(frozen.values()):
        return chain
    labels = traverse_util.unflatten_dict(
        {path: "frozen" if is_so else "trained" for path, is_so in frozen.items()}, sep="/"
    )
    return optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)


def update_rule(config: ConfigDict, rate: Schedule) -> list[optax.GradientTransformation]:
    """Gradients (clipped) to updates, before the multipliers: torch.optim.SGD or AdamW."""
    c = config.optim

    def decayed(params: Any) -> Any:
        flat = traverse_util.flatten_dict(params, sep="/")
        return traverse_util.unflatten_dict({path: trainable.decays(config, path, flat) for path in flat}, sep="/")

    decay = optax.add_decayed_weights(c.weight_decay, decayed) if c.weight_decay else optax.identity()
    if c.name == "adamw":
        return [optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate)]
    momentum = optax.trace(c.momentum, c.nesterov) if c.momentum else optax.identity()
    return [decay, momentum, optax.scale_by_learning_rate(rate)]


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """torch.nn.utils.clip_grad_norm_: gradients times min(1, max_norm / (norm + 1e-6)).

    `optax.clip_by_global_norm` has no 1e-6, a difference that a comparison in float64 sees.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_path(factor_of: Callable[[str], float]) -> optax.GradientTransformation:
    """Updates times a constant for each path, skipping those that are 1; masked leaves pass through."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def scale(path: Any, leaf: Any) -> Any:
            factor = factor_of("/".join(key.key for key in path))
            return leaf if factor == 1.0 else leaf * jnp.asarray(factor, leaf.dtype)

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
