"""Which parameter gets which treatment; the arithmetic itself is held against torch in the parity tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxsft import config as config_module
from jaxsft import optim
from jaxsft.cli import UserError
from jaxsft.models.resnet import ARCHITECTURES, variable_shapes

SHAPES = variable_shapes(ARCHITECTURES["resnet10_w16"](num_classes=3))["params"]
PARAMS = jax.tree.map(lambda s: jnp.full(s.shape, 2.0), SHAPES)
GRADS = jax.tree.map(jnp.ones_like, PARAMS)


def step_sizes(**settings: object) -> dict[str, float]:
    """By path, how far one update of a gradient of ones moves the first element of each parameter."""
    config = config_module.default()
    config.optim.lr, config.optim.schedule = 0.1, "constant"
    for key, value in settings.items():
        section, name = key.split("__")
        config[section][name] = value
    rate = optim.schedule(config, steps_per_epoch=10, total_steps=100)
    optimizer = optim.make(config, PARAMS, rate)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    return {path: -float(leaf.ravel()[0]) for path, leaf in traverse_util.flatten_dict(updates, sep="/").items()}


# setting, path, expected size of the first step (gradient 1, parameter 2, rate 0.1)
TABLE = [
    ({}, "fc/kernel", 0.1),
    ({"optim__weight_decay": 0.5}, "layer1_0/bn1/scale", 0.2),
    ({"optim__weight_decay": 0.5, "optim__decay_norm_and_bias": False}, "layer1_0/bn1/scale", 0.1),
    ({"optim__weight_decay": 0.5, "optim__decay_norm_and_bias": False}, "fc/bias", 0.1),
    ({"optim__weight_decay": 0.5, "optim__decay_norm_and_bias": False}, "fc/kernel", 0.2),
    ({"optim__nesterov": True}, "fc/kernel", 0.19),
    ({"model__freeze": (r"^conv1", r"^layer1")}, "layer1_0/conv1/kernel", 0.0),
    ({"model__freeze": (r"^conv1", r"^layer1")}, "layer2_0/conv1/kernel", 0.1),
    ({"model__freeze": (r"^layer1",), "optim__weight_decay": 0.5}, "layer1_0/bn1/bias", 0.0),
    ({"optim__lr_multipliers": ((r"^fc/", 10.0),)}, "fc/bias", 1.0),
    ({"optim__lr_multipliers": ((r"^fc/", 10.0),)}, "conv1/kernel", 0.1),
    ({"optim__lr_multipliers": ((r"bias$", 3.0), (r"^fc/", 10.0))}, "fc/bias", 0.3),
    ({"optim__layer_decay": 0.5}, "fc/kernel", 0.1),
    ({"optim__layer_decay": 0.5}, "layer4_0/conv2/kernel", 0.05),
    ({"optim__layer_decay": 0.5}, "conv1/kernel", 0.1 / 32),
    ({"optim__layer_decay": 0.5, "optim__lr_multipliers": ((r"^conv1", 2.0),)}, "conv1/kernel", 0.1 / 16),
    ({"optim__warmup_epochs": 1.0}, "fc/kernel", 0.01),
]


@pytest.mark.parametrize(("settings", "path", "expected"), TABLE)
def test_first_step(settings: dict[str, object], path: str, expected: float) -> None:
    assert step_sizes(**settings)[path] == pytest.approx(expected, rel=1e-6)


def test_frozen_parameters_hold_no_momentum() -> None:
    config = config_module.default()
    config.model.freeze = (r"^(?!fc)",)
    optimizer = optim.make(config, PARAMS, lambda t: 0.1)
    held = sum(np.size(leaf) for leaf in jax.tree.leaves(optimizer.init(PARAMS)))
    assert held == 128 * 3 + 3 + 1  # fc's kernel and bias, and the count of updates


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "freeze", ("layer9",), "'layer9' matches no parameter"),
        ("optim", "lr_multipliers", (("head", 2.0),), "'head' matches no parameter"),
        ("model", "freeze", (".",), "covers every parameter"),
    ],
)
def test_patterns_that_can_not_be_meant(section: str, key: str, value: object, message: str) -> None:
    config = config_module.default()
    config[section][key] = value
    with pytest.raises(UserError, match=message):
        optim.make(config, PARAMS, lambda t: 0.1)


def rates(total: int = 100, **settings: object) -> np.ndarray:
    config = config_module.default()
    config.optim.lr = 1.0
    config.optim.update(settings)
    return np.asarray(optim.schedule(config, steps_per_epoch=10, total_steps=total)(np.arange(total)))


def test_schedules() -> None:
    # float32 rates of up to 1: 1e-6 is ten roundings (absolute: near its end a falling rate is a difference).
    np.testing.assert_allclose(rates(schedule="constant"), np.ones(100), rtol=1e-6)
    np.testing.assert_allclose(rates(schedule="linear"), 1 - np.arange(100) / 100, atol=1e-6)
    np.testing.assert_allclose(rates(schedule="cosine"), 0.5 + 0.5 * np.cos(np.pi * np.arange(100) / 100), atol=1e-6)
    stepped = 0.1 ** (np.arange(100) // 30)
    np.testing.assert_allclose(rates(schedule="step", step_epochs=3.0), stepped, rtol=1e-6)
    warm = rates(schedule="cosine", warmup_epochs=2.0)
    np.testing.assert_allclose(warm[:20], np.arange(1, 21) / 20, rtol=1e-6)
    np.testing.assert_allclose(warm[20:], 0.5 + 0.5 * np.cos(np.pi * np.arange(80) / 80), atol=1e-6)
    with pytest.raises(UserError, match="shorter than the run"):
        rates(total=10, warmup_epochs=1.0)
