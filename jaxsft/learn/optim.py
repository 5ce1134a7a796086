"""From the rules of the parameters to one optax transformation, with torch's arithmetic where torch has it.

SGD is `clip -> add weight decay to the gradient -> momentum trace -> rate`: torch's order (Sutskever's form differs:
there the rate is inside the buffer). No part counts updates to find its rate: `update` is told which one it makes, as
`optimizer.update(grads, state, params, step=step)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict
from optax import contrib

from jaxsft.learn import trainable
from jaxsft.learn.schedule import Schedule
from jaxsft.learn.trainable import Rule, Rules

FROZEN = "frozen"
BETAS = {"lion": (0.9, 0.99)}  # of those that differ from Adam's
ADAM_BETAS, ADAM_EPS, LAMB_EPS = (0.9, 0.999), 1e-8, 1e-6
MUON_RMS = 0.2  # of an element of its update, which is about AdamW's (Liu et al. 2025, arXiv:2502.16982)


def make_optimizer(
    config: ConfigDict, params: Any, rate: Schedule, fresh: Collection[str] = (), epoch: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the config for parameters shaped like `params`, built from `trainable.rules` alone.

    Its state has one structure at every `epoch`: parameters that begin to train later than that are held, which
    leaves them and their state as they are. What is frozen or held has no part in the norm that is clipped.

    Args:
      config: of the run.
      params: parameters, or their shapes.
      rate: of every update.
      fresh: as for `trainable.rules`.
      epoch: the parameters that begin after it are held.

    Raises:
      UserError: as `trainable.rules`.
    """
    rules = trainable.rules(config, params, fresh)
    starts = sorted({rule.start for rule in rules.values() if rule.start is not None})
    names = {start: f"group_{number}" for number, start in enumerate(starts)}

    clip = clip_by_norm(config.optim.clip_norm) if config.optim.clip_norm else optax.identity()
    group = optax.chain(*update_rule(config, rules, rate), scale_by_path(lambda path: rules[path].factor))
    if len(starts) == 1 and all(rule.start is not None for rule in rules.values()):
        return optax.chain(clip, group)
    groups = {name: group if start <= epoch else held(group) for start, name in names.items()}
    labels = by_path(rules, lambda rule: FROZEN if rule.start is None else names[rule.start])
    everything = optax.partition({**groups, FROZEN: optax.set_to_zero()}, labels)
    return optax.chain(without(trainable.waiting(rules, epoch)), clip, everything)


def update_rule(config: ConfigDict, rules: Rules, rate: Schedule) -> list[optax.GradientTransformation]:
    """Gradients (clipped) to updates, before the multipliers.

    sgd and adamw are torch.optim's; lamb is You et al. 2020 (arXiv:1904.00962), lars You et al. 2017
    (arXiv:1708.03888) with the rate inside the momentum, lion Chen et al. 2023 (arXiv:2302.06675), muon Jordan et al.
    2024 as torch.optim.Muon(adjust_lr_fn="match_rms_adamw") has it, with adamw for all that is no weight.
    """
    c = config.optim
    b1, b2 = c.betas or BETAS.get(c.name, ADAM_BETAS)
    adam = optax.scale_by_adam(b1, b2, c.eps or (LAMB_EPS if c.name == "lamb" else ADAM_EPS))
    momentum = optax.trace(c.momentum, c.nesterov) if c.momentum else optax.identity()
    decay, scale = add_decay(rules), scale_by_rate(rate)
    weights = by_path(rules, lambda rule: rule.adapts)
    if c.name == "adamw":
        return [adam, decay, scale]
    if c.name == "lion":
        return [optax.scale_by_lion(b1, b2), decay, scale]
    if c.name == "lamb":
        return [adam, decay, optax.masked(optax.scale_by_trust_ratio(), weights), scale]
    if c.name == "lars":
        trust = optax.scale_by_trust_ratio(trust_coefficient=c.trust_coefficient)
        return [decay, optax.masked(trust, weights), scale, momentum]
    if c.name == "muon":
        parts = {"muon": optax.chain(momentum, orthogonalize()), "adam": adam}
        return [optax.partition(parts, by_path(rules, lambda rule: "muon" if rule.adapts else "adam")), decay, scale]
    return [decay, momentum, scale]


def by_path(rules: Rules, value: Callable[[Rule], Any]) -> Any:
    """What `value` makes of each rule, as a tree like the parameters'."""
    return traverse_util.unflatten_dict({path: value(rule) for path, rule in rules.items()}, sep="/")


def path_of(keys: Any) -> str:
    """A parameter's path, of the keys that lead to it."""
    return "/".join(key.key for key in keys)


def stateless(update: Callable[[Any, Any], Any]) -> optax.GradientTransformation:
    """A transformation that keeps nothing: `update` takes updates and parameters."""
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda updates, state, params=None: (update(updates, params), state)
    )


def held(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` before it begins: updates of zero, and its state as it was made."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, updates), state

    return optax.GradientTransformation(inner.init, update)


def without(paths: Collection[str]) -> optax.GradientTransformation:
    """Zeros in the place of the gradients of `paths`."""

    def zero(keys: Any, leaf: Any) -> Any:
        return jnp.zeros_like(leaf) if path_of(keys) in paths else leaf

    return stateless(lambda updates, params: jax.tree_util.tree_map_with_path(zero, updates))


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """torch.nn.utils.clip_grad_norm_: gradients times min(1, max_norm / (norm + 1e-6)).

    `optax.clip_by_global_norm` has no 1e-6, a difference that a comparison in float64 sees.
    """

    def clip(updates: Any, params: Any) -> Any:
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return stateless(clip)


def add_decay(rules: Rules) -> optax.GradientTransformation:
    """Updates plus each rule's decay times its parameter; or times the way it has come, where it decays to its start.

    The latter is L2-SP (Li et al. 2018, arXiv:1802.01483); the state keeps the starts, of those parameters alone.
    """

    def kept(keys: Any, leaf: Any) -> Any:
        rule = rules[path_of(keys)]
        return jnp.copy(leaf) if rule.to_start and rule.decay else optax.MaskedNode()

    def add(keys: Any, leaf: Any, value: Any, start: Any = None) -> Any:
        rule = rules[path_of(keys)]
        if not rule.decay:
            return leaf
        return leaf + rule.decay * (value - start if rule.to_start else value)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree_util.tree_map_with_path(add, updates, params, state), state

    if any(rule.to_start and rule.decay for rule in rules.values()):
        return optax.GradientTransformation(lambda params: jax.tree_util.tree_map_with_path(kept, params), update)
    return stateless(lambda updates, params: jax.tree_util.tree_map_with_path(add, updates, params))


def orthogonalize() -> optax.GradientTransformation:
    """Muon's step of matrices, and of convolutions' kernels [H, W, I, O] as matrices [H * W * I, O].

    Five Newton-Schulz iterations, then times 0.2 * sqrt(the longer side). The momentum is not optax's, whose correction
    of the bias torch lacks; without one `scale_by_muon` is the iterations alone.
    """

    def sides(updates: Any) -> Any:
        return jax.tree.map(
            lambda leaf: contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,)), updates
        )

    iterations = contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=sides)

    def update(updates: Any, params: Any) -> Any:
        turned, _ = iterations.update(updates, iterations.init(updates))
        return jax.tree.map(lambda leaf: leaf * (MUON_RMS * longer_side(leaf.shape) ** 0.5), turned)

    return stateless(update)


def longer_side(shape: tuple[int, ...]) -> int:
    """Of the matrix that Muon takes an array of this shape for."""
    return max(math.prod(shape[:-1]), shape[-1])


def scale_by_rate(rate: Schedule) -> optax.GradientTransformationExtraArgs:
    """Updates times minus the rate of the update that `step`, an extra argument of `update`, says is made."""

    def update(updates: Any, state: Any, params: Any = None, *, step: Any, **_: Any) -> tuple[Any, Any]:
        size = -rate(step)
        return jax.tree.map(lambda leaf: jnp.asarray(size, leaf.dtype) * leaf, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_by_path(factor_of: Callable[[str], float]) -> optax.GradientTransformation:
    """Updates times a factor for each path, skipping those that are 1.0; masked leaves pass through."""

    def scale(keys: Any, leaf: Any) -> Any:
        factor = factor_of(path_of(keys))
        return leaf if isinstance(factor, float) and factor == 1.0 else leaf * jnp.asarray(factor, leaf.dtype)

    return stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))
