"""What training starts from: the model of the config, its variables (ported, or fresh), a head of the right width."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxsft import weights
from jaxsft.cli import UserError
from jaxsft.models.layers import Linear
from jaxsft.models.resnet import ARCHITECTURES, ResNet
from jaxsft.weights import ModelCard, Preprocessing

HEAD = "fc"
TORCHVISION = Preprocessing()  # its weights' but for the V2 ones' 232 px
EVERYWHERE = ("",)  # the pattern that every path contains


def make_model(config: ConfigDict, num_classes: int, axis_name: str | None = None) -> ResNet:
    """The network to train, as the config wants it; parameters are float32 whatever its precision.

    `axis_name` is that of the devices over which batch norm takes its statistics; None: each its own.
    """
    frozen = EVERYWHERE if config.model.batch_norm == "frozen" else tuple(config.model.freeze)
    return ARCHITECTURES[config.model.arch](
        num_classes=num_classes,
        head_init=config.model.head_init,
        dtype=jnp.dtype(config.train.precision),
        axis_name=axis_name,
        frozen=frozen,
        remat=config.train.remat,
    )


def preprocessing(config: ConfigDict, of_weights: Preprocessing = TORCHVISION) -> Preprocessing:
    """What turns this run's images into the model's input.

    With data.preset 'weights' what the weights were trained for, in proportion where the image size is another.
    """
    data, preset = config.data, of_weights
    if data.preset == "weights":
        resize_size = round(data.image_size * preset.resize_size / preset.crop_size)
        return dataclasses.replace(preset, resize_size=resize_size, crop_size=data.image_size)
    return Preprocessing(data.resize_size or data.image_size, data.image_size, tuple(data.mean), tuple(data.std))


def initial(
    config: ConfigDict, class_names: tuple[str, ...], axis_name: str | None = None
) -> tuple[ResNet, dict[str, Any], ModelCard, str]:
    """The model, its variables, the card of the run, and a line that says what was done with the head.

    Ported weights keep their head when its classes are the data's; else it is replaced by a fresh one.

    Raises:
      UserError: weights that can't be had or do not fit, or fewer classes asked for than the data has, or weighted.
    """
    c = config.model
    num_classes = c.num_classes or len(class_names)
    if num_classes < len(class_names):
        raise UserError(f"config.model.num_classes is {num_classes}", f"the data has {len(class_names)} classes")
    if (count := len(config.train.class_weights)) not in (0, num_classes):
        raise UserError(
            f"config.train.class_weights has {count} numbers", f"give one for each of {num_classes} classes"
        )
    model = make_model(config, num_classes, axis_name)
    names = class_names if num_classes == len(class_names) else None
    card = ModelCard(c.arch, num_classes, names, preprocessing=preprocessing(config))
    if not c.weights:
        return model, init_variables(model, config.seed), card, f"{c.arch} from scratch, {num_classes} classes"

    variables, origin = weights.load(weights.port(c.weights, c.arch))
    card = dataclasses.replace(
        card,
        source=origin.source,
        sha256=origin.sha256,
        weights_version=origin.weights_version,
        preprocessing=preprocessing(config, origin.preprocessing),
    )
    same = origin.num_classes == num_classes and origin.class_names in (None, names)
    if same:
        return model, variables, card, f"{c.arch} of {origin.source}, its head of {num_classes} classes kept"
    variables["params"][HEAD] = init_head(model, variables["params"][HEAD], config.seed)
    said = f"{c.arch} of {origin.source}, its head of {origin.num_classes} classes replaced by one of {num_classes}"
    return model, variables, card, said


def init_head(model: ResNet, old: dict[str, jax.Array], seed: int) -> dict[str, jax.Array]:
    """A fresh output layer for `model`, over as many features as the `old` one had."""
    layer = Linear(model.num_classes, model.head_init, model.param_dtype)
    return layer.init(jax.random.key(seed), jnp.zeros((1, old["kernel"].shape[0])))["params"]


def init_variables(model: nn.Module, seed: int) -> dict[str, Any]:
    """Fresh variables: {"params": ..., "batch_stats": ...}."""
    return jax.jit(lambda key: model.init(key, jnp.zeros((2, 64, 64, 3)), train=False))(jax.random.key(seed))
