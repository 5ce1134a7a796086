"""What trains, at which rate, and what decays: of every parameter by its path, from the config.

Each parameter is frozen or trained, has one multiplier of its rate, and is of one kind, by which it decays or not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from jaxsft.cli import UserError
from jaxsft.models.families import family_of
from jaxsft.models.family import PARAMETER_KINDS
from jaxsft.models.initial import frozen_patterns
from jaxsft.models.layers import is_frozen


def frozen_parameters(config: ConfigDict, params: Any) -> dict[str, bool]:
    """Which parameters, by path, are frozen; `params` may be shapes.

    Raises:
      UserError: a pattern of model.freeze or optim.lr_multipliers that matches no parameter, or everything is frozen.
    """
    paths, patterns = list(traverse_util.flatten_dict(params, sep="/")), frozen_patterns(config)
    found = {path: is_frozen(tuple(path.split("/")), patterns) for path in paths}
    check_patterns("model.freeze", config.model.freeze, paths)
    check_patterns("optim.lr_multipliers", [pattern for pattern, _ in config.optim.lr_multipliers], paths)
    if all(found.values()):
        head = family_of(config.model.arch).head
        raise UserError("config.model.freeze covers every parameter", f"leave some to train, such as {head}")
    return found


def check_patterns(key: str, patterns: Iterable[str], paths: list[str]) -> None:
    """Raise a UserError for a pattern that is found in no path."""
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise UserError(
                f"config.{key}: {pattern!r} matches no parameter", f"paths look like {paths[0]} and {paths[-1]}"
            )


def lr_multiplier(config: ConfigDict, path: str, paths: Iterable[str]) -> float:
    """The factor on the rate of one parameter: its pattern's of lr_multipliers times its stage's of layer_decay.

    `paths` are all parameters of the network. Its stages are counted from the head down, those that it has: the numbers
    of a family's leave room for its deepest network.
    """
    own = next((factor for pattern, factor in config.optim.lr_multipliers if re.search(pattern, path)), 1.0)
    stage_of = family_of(config.model.arch).stage_of
    above = {stage for stage in map(stage_of, paths) if stage > stage_of(path)}
    return float(own * config.optim.layer_decay ** len(above))


def decays(config: ConfigDict, path: str, paths: Collection[str]) -> bool:
    """Whether weight decay takes the parameter `path`, one of `paths`.

    The bias of a norm is of two kinds, norm and bias, as it is to torchvision's `set_weight_decay`.

    Raises:
      UserError: no kind is known of it, and the config asks for one.
    """
    spared = {*config.optim.no_decay, *(() if config.optim.decay_norm_and_bias else ("norm", "bias"))}
    if not spared:
        return True
    module, _, leaf = path.rpartition("/")
    if leaf not in PARAMETER_KINDS:
        known = ", ".join(PARAMETER_KINDS)
        raise UserError(f"of no kind that weight decay knows is {path}", f"its last part must be one of {known}")
    kinds = {PARAMETER_KINDS[leaf]}
    if f"{module}/scale" in paths:
        kinds.add("norm")
    return not kinds & spared
