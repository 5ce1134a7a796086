"""What training starts from: the model of the config, its variables (ported, or fresh), a head of the right width."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from jaxsft.cli import UserError
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.models.family import ImageSizeError, init_variables, variable_shapes
from jaxsft.models.layers import Linear
from jaxsft.models.precision import resolved_precision
from jaxsft.models.rows import rows_of, with_rows
from jaxsft.models.weights import ModelCard, Preprocessing

TORCHVISION = Preprocessing()  # its weights' but for the V2 ones' 232 px
EVERYWHERE = ("",)  # the pattern that every path contains
Pretrained = Callable[
    [str, str, str], tuple[dict[str, Any], ModelCard]
]  # (weights, arch, checkpoint) -> variables, card


def make_model(
    config: ConfigDict, num_classes: int, axis_name: str | None = None, devices: Sequence[Any] | None = None
) -> nn.Module:
    """The network to train, as the config wants it; parameters are float32 whatever its precision.

    Args:
      config: of the run.
      num_classes: of its head.
      axis_name: of the devices over which batch norm takes its statistics; None: each its own.
      devices: that it is computed on, which decide on the precision 'auto'; None: `jax.devices()`.

    Raises:
      UserError: a rate of dropout or stochastic depth for a network that has none.
    """
    frozen = EVERYWHERE if config.model.batch_norm == "frozen" else frozen_patterns(config)
    architecture, rates = ARCHITECTURES[config.model.arch], {}
    module: Any = getattr(architecture, "func", architecture)  # of a partial
    fields = {field.name for field in dataclasses.fields(module)}
    for name in ("dropout", "stochastic_depth"):
        if (rate := config.model[name]) is not None:
            if name not in fields:
                what = f"config.model.{name} is {rate}, and {config.model.arch} has none"
                raise UserError(what, f"leave it out: --config.model.{name}=None")
            rates[name] = rate
    return architecture(
        num_classes=num_classes,
        head_init=config.model.head_init,
        dtype=jnp.dtype(resolved_precision(config.train.precision, devices or jax.devices())),
        axis_name=axis_name,
        frozen=frozen,
        remat=config.train.remat,
        **rates,
    )


def frozen_patterns(config: ConfigDict) -> tuple[str, ...]:
    """Regular expressions of the paths of what is not trained: model.freeze; of a probe all but the output layer."""
    patterns = tuple(config.model.freeze)
    if config.train.method == "probe":
        patterns += (rf"^(?!{re.escape(family_of(config.model.arch).head)}(/|$))",)
    return patterns


def checked_shapes(model: nn.Module, image_size: int) -> dict[str, Any]:
    """`variable_shapes` for images of that side (px); a UserError where the network can't take such."""
    try:
        return variable_shapes(model, image_size)
    except ImageSizeError as error:
        raise UserError(f"config.data.image_size is {image_size}", str(error)) from None


def preprocessing(config: ConfigDict, of_weights: Preprocessing = TORCHVISION) -> Preprocessing:
    """What turns this run's images into the model's input.

    With data.preset 'weights' what the weights were trained for, in proportion where the image size is another, resized
    by their interpolation.
    """
    data, preset = config.data, of_weights
    if data.preset == "weights":
        resize_size = round(data.image_size * preset.resize_size / preset.crop_size)
        return dataclasses.replace(preset, resize_size=resize_size, crop_size=data.image_size)
    resize_size = data.resize_size or data.image_size
    return Preprocessing(resize_size, data.image_size, tuple(data.mean), tuple(data.std), data.interpolation)


def initial(
    config: ConfigDict,
    class_names: tuple[str, ...],
    pretrained: Pretrained,
    axis_name: str | None = None,
    devices: Sequence[Any] | None = None,
) -> tuple[nn.Module, dict[str, Any], ModelCard, str, tuple[str, ...]]:
    """The model, its variables, the card of the run, a line that says what was done with the head, and what is fresh.

    The latter are the paths of the parameters that did not come from weights.

    Ported weights keep their head where its classes are known and are the data's, and where config.model.head is
    'keep'; else it is replaced by a fresh one. With config.model.classes its rows go with their names.

    Args:
      config: of the run.
      class_names: of the data; with config.model.classes those.
      pretrained: how weights are had, as `run.pretrained.load_pretrained`.
      axis_name, devices: as for `make_model`.

    Raises:
      UserError: weights that can't be had or do not fit, fewer classes asked for than the data has, or weighted, or a
        head to be kept that is not there or has another number of classes.
    """
    c = config.model
    num_classes = c.num_classes or len(class_names)
    if num_classes < len(class_names):
        raise UserError(f"config.model.num_classes is {num_classes}", f"the data has {len(class_names)} classes")
    weights = tuple(config.train.class_weights)
    if (count := len(weights)) not in (0, num_classes) and weights != ("balanced",):
        raise UserError(
            f"config.train.class_weights has {count} numbers", f"give one for each of {num_classes} classes"
        )
    model = make_model(config, num_classes, axis_name, devices)
    checked_shapes(model, config.data.image_size)
    names = class_names if num_classes == len(class_names) else None
    order = config.data.class_order
    card = ModelCard(c.arch, num_classes, names, preprocessing=preprocessing(config), class_order=order)
    fresh: tuple[str, ...] = ()
    if not c.weights:
        variables = init_variables(model, config.seed, config.data.image_size)
        fresh = tuple(traverse_util.flatten_dict(variables["params"], sep="/"))
        return model, variables, card, f"{c.arch} from scratch, {num_classes} classes", fresh

    variables, origin = pretrained(c.weights, c.arch, c.checkpoint)
    card = dataclasses.replace(
        card,
        source=origin.source,
        sha256=origin.sha256,
        weights_version=origin.weights_version,
        preprocessing=preprocessing(config, origin.preprocessing),
    )
    if resized := family_of(c.arch).resized:
        variables = resized(variables, config.data.image_size)
    head, params = family_of(c.arch).head, variables["params"]
    if c.classes:
        rows, said = rows_of(c.classes, origin.class_names, origin.source)
        params[head] = with_rows(init_head(model, params[head], config.seed), params[head], rows)
        return model, variables, card, f"{c.arch} of {origin.source}, {said}", fresh_of(head, params)
    kept, said = decide_head(c.head, origin, num_classes, names)
    if not kept:
        old = params.get(head) or variable_shapes(model, config.data.image_size)["params"][head]
        params[head] = init_head(model, old, config.seed)
        fresh = fresh_of(head, params)
    return model, variables, card, f"{c.arch} of {origin.source}, {said}", fresh


def fresh_of(head: str, params: dict[str, Any]) -> tuple[str, ...]:
    """The paths of the output layer's parameters."""
    return tuple(f"{head}/{leaf}" for leaf in params[head])


def decide_head(wanted: str, origin: ModelCard, num_classes: int, names: tuple[str, ...] | None) -> tuple[bool, str]:
    """Whether weights keep their head, and a line that says it and why.

    Args:
      wanted: config.model.head.
      origin: the weights' card.
      num_classes: of the head that is trained.
      names: of the data's classes; None: the head has more outputs than the data has classes.

    Raises:
      UserError: it is to be kept and can't be.
    """
    count = origin.num_classes
    head = f"its head of {count} classes" if count else "which has no head"
    if wanted == "keep":
        if count != num_classes:
            has = f"has a head of {count} classes" if count else "has no head"
            what = f"config.model.head is 'keep' for {num_classes} classes, and {origin.source} {has}"
            raise UserError(what, "set --config.model.head=replace")
        return True, f"{head} kept as config.model.head says"
    if not count:
        return False, f"{head}, given one of {num_classes}"
    if wanted == "auto" and count == num_classes:
        if names is not None and origin.class_names == names:
            return True, f"{head} kept, for they are the data's"
        why = "whose names are not known" if origin.class_names is None else "which are not the data's"
        return False, f"{head}, {why}, replaced; --config.model.head=keep keeps it"
    return False, f"{head} replaced by one of {num_classes}"


def init_head(model: nn.Module, old: dict[str, Any], seed: int) -> dict[str, jax.Array]:
    """A fresh output layer for `model`, over as many features as the `old` one has."""
    layer = Linear(model.num_classes, model.head_init, param_dtype=model.param_dtype)
    return layer.init(jax.random.key(seed), jnp.zeros((1, old["kernel"].shape[0])))["params"]
