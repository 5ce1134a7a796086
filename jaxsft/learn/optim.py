"""From the config to one optax chain, with torch's arithmetic.

SGD is `clip -> add weight decay to the gradient -> momentum trace -> rate`: torch's order (Sutskever's form differs:
there the rate is inside the buffer). Each parameter belongs to exactly one group (frozen or trained) and has one
multiplier of its rate; a pattern that matches no parameter stops the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from jaxsft.cli import UserError
from jaxsft.models.layers import is_frozen
from jaxsft.models.resnet import stage_of

Schedule = Callable[[Any], Any]
HEAD_STAGE = 5


def schedule(config: ConfigDict, steps_per_epoch: int, total_steps: int) -> Schedule:
    """The learning rate of update t = 0, 1, ...: linear warm-up, then the named schedule over the remaining steps.

    Warm-up ends at the full rate: update t of W has (t + 1) / W of it, so that the first one already does something.
    "cosine" and "linear" fall to 0 just after the last update; "step" multiplies by `step_factor` at multiples of
    `step_epochs`, in whole updates, counted from the start, as torch's StepLR does.
    """
    c = config.optim
    warmup = round(c.warmup_epochs * steps_per_epoch)
    if warmup >= total_steps and warmup:
        raise UserError(f"config.optim.warmup_epochs is {c.warmup_epochs}", "it must be shorter than the run")
    rest = total_steps - warmup
    period = max(round(c.step_epochs * steps_per_epoch), 1)  # whole: XLA's quotient of 41 by 41 is just below 1

    def factor(t: Any) -> Any:
        done = jnp.clip((t - warmup) / rest, 0.0, 1.0)
        if c.schedule == "cosine":
            return 0.5 * (1 + jnp.cos(jnp.pi * done))
        if c.schedule == "linear":
            return 1 - done
        if c.schedule == "step":
            return c.step_factor ** (t.astype(int) // period).astype(t.dtype)
        return jnp.ones_like(done)

    def rate(t: Any) -> Any:
        t = jnp.asarray(t, float)  # whole numbers alone would be divided in float32 even where float64 is enabled
        if not warmup:
            return c.lr * factor(t)
        return c.lr * jnp.where(t < warmup, (t + 1) / warmup, factor(t))

    return rate


def make(config: ConfigDict, params: Any, rate: Schedule) -> optax.GradientTransformation:
    """The optimizer of the config for parameters shaped like `params`.

    Raises:
      UserError: a pattern of model.freeze or optim.lr_multipliers that matches no parameter, or everything is frozen.
    """
    frozen = check_patterns(config, params)

    chain = optax.chain(
        clip_by_norm(config.optim.clip_norm) if config.optim.clip_norm else optax.identity(),
        *update_rule(config, rate),
        scale_by_tree(lambda path: multiplier(config, path)),
    )
    if not any(frozen.values()):
        return chain
    labels = traverse_util.unflatten_dict(
        {path: "frozen" if is_so else "trained" for path, is_so in frozen.items()}, sep="/"
    )
    return optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)


def check_patterns(config: ConfigDict, params: Any) -> dict[str, bool]:
    """Which parameters, by path, are frozen; `params` may be shapes.

    Raises:
      UserError: a pattern of model.freeze or optim.lr_multipliers that matches no parameter, or everything is frozen.
    """
    paths = list(traverse_util.flatten_dict(params, sep="/"))
    frozen = {path: is_frozen(tuple(path.split("/")), tuple(config.model.freeze)) for path in paths}
    must_match("model.freeze", config.model.freeze, paths)
    must_match("optim.lr_multipliers", [pattern for pattern, _ in config.optim.lr_multipliers], paths)
    if all(frozen.values()):
        raise UserError("config.model.freeze covers every parameter", "leave some to train, such as fc")
    return frozen


def update_rule(config: ConfigDict, rate: Schedule) -> list[optax.GradientTransformation]:
    """Gradients (clipped) to updates, before the multipliers: torch.optim.SGD or AdamW."""
    c = config.optim

    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda p: c.decay_norm_and_bias or p.ndim > 1, params)

    decay = optax.add_decayed_weights(c.weight_decay, decayed) if c.weight_decay else optax.identity()
    if c.name == "adamw":
        return [optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate)]
    momentum = optax.trace(c.momentum, c.nesterov) if c.momentum else optax.identity()
    return [decay, momentum, optax.scale_by_learning_rate(rate)]


def multiplier(config: ConfigDict, path: str) -> float:
    """The factor on the rate of one parameter: its pattern's of lr_multipliers times its stage's of layer_decay."""
    own = next((factor for pattern, factor in config.optim.lr_multipliers if re.search(pattern, path)), 1.0)
    return float(own * config.optim.layer_decay ** (HEAD_STAGE - stage_of(path)))


def must_match(key: str, patterns: Any, paths: list[str]) -> None:
    """Raise a UserError for a pattern that is found in no path."""
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise UserError(
                f"config.{key}: {pattern!r} matches no parameter", f"paths look like {paths[0]} and {paths[-1]}"
            )


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """torch.nn.utils.clip_grad_norm_: gradients times min(1, max_norm / (norm + 1e-6)).

    `optax.clip_by_global_norm` has no 1e-6, a difference that a comparison in float64 sees.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_tree(factor_of: Callable[[str], float]) -> optax.GradientTransformation:
    """Updates times a constant for each path, skipping those that are 1; masked leaves pass through."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def scale(path: Any, leaf: Any) -> Any:
            factor = factor_of("/".join(key.key for key in path))
            return leaf if factor == 1.0 else leaf * jnp.asarray(factor, leaf.dtype)

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
