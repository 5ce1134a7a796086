"""What trains, from when, at which rate, and what decays: one rule for every parameter, from the config.

Each parameter is frozen or trained, perhaps from a later epoch on, has one multiplier of its rate, and is of one kind,
by which it decays or not. The optimizer is built from these rules alone, and people are shown them as a table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from flax import traverse_util
from ml_collections import ConfigDict

from jaxsft.cli import UserError
from jaxsft.models.families import family_of
from jaxsft.models.family import PARAMETER_KINDS
from jaxsft.models.initial import frozen_patterns
from jaxsft.models.layers import is_frozen

ADAPTING = ("lamb", "lars", "muon")  # optimizers that treat weights otherwise than norms and biases
COLUMNS = ("parameter", "shape", "trains from epoch", "rate", "decay")


class Rule(NamedTuple):
    """How one parameter is trained."""

    shape: tuple[int, ...]
    start: float | None  # the epoch from which it trains; None: never
    factor: float  # on the rate
    decay: float  # of weight decay, before the rate
    to_start: bool = False  # whether it decays towards where it started (L2-SP), not towards 0
    # Whether it is a weight, a matrix or a convolution's kernel, to an optimizer that treats those by themselves. To
    # muon the head is none, as its authors say.
    adapts: bool = False


Rules = Mapping[str, Rule]  # by the parameters' paths


def rules(config: ConfigDict, params: Any, fresh: Collection[str] = ()) -> dict[str, Rule]:
    """The rule of every parameter, by its path.

    Args:
      config: of the run.
      params: parameters, or their shapes.
      fresh: paths of those that did not come from model.weights, such as a new head's.

    Raises:
      UserError: a pattern of model.freeze, model.unfreeze or optim.lr_multipliers that matches no parameter (of the
        frozen ones for unfreeze), nothing that trains from the start, or a parameter of no known kind where the config
        asks for one.
    """
    flat, found = traverse_util.flatten_dict(params, sep="/"), {}
    paths = list(flat)
    check_patterns("optim.lr_multipliers", [pattern for pattern, _ in config.optim.lr_multipliers], paths)
    begins = starts(config, paths)
    pulled = config.optim.l2_sp and config.model.weights
    for path, leaf in flat.items():
        to_start = bool(pulled) and path not in fresh
        decay = config.optim.l2_sp if to_start else config.optim.weight_decay
        found[path] = Rule(
            shape=tuple(leaf.shape),
            start=begins[path],
            factor=lr_multiplier(config, path, paths),
            decay=decay if decays(config, path, flat) else 0.0,
            to_start=to_start,
            adapts=adapts(config, path, flat),
        )
    return found


def starts(config: ConfigDict, paths: Collection[str]) -> dict[str, float | None]:
    """By path, the epoch from which a parameter trains; None: never.

    Raises:
      UserError: as `rules`.
    """
    model = config.model
    patterns = frozen_patterns(config)
    frozen = [path for path in paths if is_frozen(tuple(path.split("/")), patterns)]
    check_patterns("model.freeze", model.freeze, paths)
    check_patterns("model.unfreeze", [pattern for pattern, _ in model.unfreeze], frozen, "frozen parameter")
    if len(frozen) == len(paths):
        raise UserError("config.model.freeze covers every parameter", f"leave some to train, such as {head_of(config)}")
    found: dict[str, float | None] = dict.fromkeys(paths, 0.0)
    for path in frozen:
        found[path] = next((float(epoch) for pattern, epoch in model.unfreeze if re.search(pattern, path)), None)
    return found


def check_patterns(key: str, patterns: Iterable[str], paths: Collection[str], what: str = "parameter") -> None:
    """Raise a UserError for a pattern that is found in no path; `what` the paths are of."""
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            first, last = (*paths, "none")[0], ("none", *paths)[-1]
            raise UserError(f"config.{key}: {pattern!r} matches no {what}", f"paths look like {first} and {last}")


def head_of(config: ConfigDict) -> str:
    """The path of the output layer."""
    return family_of(config.model.arch).head


def lr_multiplier(config: ConfigDict, path: str, paths: Iterable[str]) -> float:
    """The factor on the rate of one parameter: its pattern's of lr_multipliers times its stage's of layer_decay.

    `paths` are all parameters of the network. Its stages are counted from the head down, those that it has: the numbers
    of a family's leave room for its deepest network.
    """
    own = next((factor for pattern, factor in config.optim.lr_multipliers if re.search(pattern, path)), 1.0)
    if config.optim.layer_decay == 1:
        return float(own)
    stage_of = family_of(config.model.arch).stage_of
    above = {stage for stage in map(stage_of, paths) if stage > stage_of(path)}
    return own * config.optim.layer_decay ** len(above) if above else float(own)


def kinds_of(path: str, paths: Collection[str]) -> set[str]:
    """Of which kinds the parameter `path`, one of `paths`, is.

    The bias of a norm is of two kinds, norm and bias, as it is to torchvision's `set_weight_decay`.

    Raises:
      UserError: no kind is known of it.
    """
    module, _, leaf = path.rpartition("/")
    if leaf not in PARAMETER_KINDS:
        raise UserError(f"of no known kind is {path}", f"its last part must be one of {', '.join(PARAMETER_KINDS)}")
    return {PARAMETER_KINDS[leaf]} | ({"norm"} if f"{module}/scale" in paths else set())


def decays(config: ConfigDict, path: str, paths: Collection[str]) -> bool:
    """Whether weight decay takes the parameter `path`, one of `paths`.

    Raises:
      UserError: no kind is known of it, and the config asks for one.
    """
    spared = {*config.optim.no_decay, *(() if config.optim.decay_norm_and_bias else ("norm", "bias"))}
    return not spared or not kinds_of(path, paths) & spared


def adapts(config: ConfigDict, path: str, paths: Mapping[str, Any]) -> bool:
    """Whether the optimizer treats the parameter `path`, one of `paths` with shapes, as a weight: see `Rule`.

    Raises:
      UserError: no kind is known of it, and the optimizer asks for one.
    """
    name = config.optim.name
    if name not in ADAPTING or kinds_of(path, paths) != {"weight"}:
        return False
    return len(paths[path].shape) in (2, 4) and not (name == "muon" and path.startswith(f"{head_of(config)}/"))


def phases(rules: Rules, steps_per_epoch: int, total_steps: int) -> list[tuple[int, float]]:
    """When more parameters begin to train: (updates done by then, epoch), from (0, ...) on, in this order.

    Raises:
      UserError: a parameter that would begin after the end of the run.
    """
    found = {0: 0.0}
    for start in sorted({rule.start for rule in rules.values() if rule.start is not None}):
        found[round(start * steps_per_epoch)] = start
        if start and round(start * steps_per_epoch) >= total_steps:
            length = f"the run is {total_steps / steps_per_epoch:g} epochs long"
            raise UserError(f"config.model.unfreeze begins at epoch {start:g}", f"it must be earlier, for {length}")
    return list(found.items())


def waiting(rules: Rules, epoch: float) -> tuple[str, ...]:
    """The paths of the parameters that do not train at `epoch`."""
    return tuple(path for path, rule in rules.items() if rule.start is None or rule.start > epoch)


def frozen_modules(config: ConfigDict, rules: Rules, epoch: float) -> tuple[str, ...]:
    """Patterns of the modules that are frozen at `epoch`: those that model.freeze finds, until all in them trains."""
    freeze = frozen_patterns(config)
    if not config.model.unfreeze:
        return freeze
    modules = dict.fromkeys(path.rpartition("/")[0] for path in waiting(rules, epoch))
    names = [re.escape(module) for module in modules if is_frozen(tuple(module.split("/")), freeze)]
    return (f"^({'|'.join(names)})$",) if names else ()


def table(rules: Rules, lr: float) -> list[tuple[str, ...]]:
    """The rules for people, a row each, as COLUMNS says: rates are `lr`, the peak, times the rule's factor."""
    rows: list[tuple[str, ...]] = []
    for path, rule in rules.items():
        shape = "x".join(map(str, rule.shape))
        if rule.start is None:
            rows.append((path, shape, "never", "-", "-"))
        else:
            decay = f"{rule.decay:g}{' to its start' if rule.to_start and rule.decay else ''}"
            rows.append((path, shape, f"{rule.start:g}", f"{lr * rule.factor:.4g}", decay))
    return rows
