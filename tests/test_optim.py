"""Which parameter gets which treatment, and what torch's optimizers make of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

from jaxsft import config as config_module
from jaxsft.learn.optim import make_optimizer
from jaxsft.learn.schedule import make_schedule
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.family import variable_shapes

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
    rate = make_schedule(config, steps_per_epoch=10, total_steps=100)
    optimizer = make_optimizer(config, PARAMS, rate)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS, step=jnp.int32(0))
    return {path: -float(leaf.ravel()[0]) for path, leaf in traverse_util.flatten_dict(updates, sep="/").items()}


# setting, path, expected size of the first step (gradient 1, parameter 2, rate 0.1)
TABLE = [
    ({}, "fc/kernel", 0.1),
    ({"optim__weight_decay": 0.5}, "layer1_0/bn1/scale", 0.2),
    ({"optim__weight_decay": 0.5, "optim__decay_norm_and_bias": False}, "layer1_0/bn1/scale", 0.1),
    ({"optim__weight_decay": 0.5, "optim__decay_norm_and_bias": False}, "fc/bias", 0.1),
    ({"optim__weight_decay": 0.5, "optim__decay_norm_and_bias": False}, "fc/kernel", 0.2),
    ({"optim__weight_decay": 0.5, "optim__no_decay": ("bias",)}, "layer1_0/bn1/bias", 0.1),
    ({"optim__weight_decay": 0.5, "optim__no_decay": ("bias",)}, "layer1_0/bn1/scale", 0.2),
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
    optimizer = make_optimizer(config, PARAMS, lambda t: 0.1)
    held = sum(np.size(leaf) for leaf in jax.tree.leaves(optimizer.init(PARAMS)))
    assert held == 128 * 3 + 3  # fc's kernel and bias


# A rate that changes, and gradients that a clipping norm of 1 cuts now and then.
UPDATES, SGD = 6, torch.optim.SGD
NAMES = ("conv1/kernel", "layer1_0/bn1/scale", "layer4_0/conv1/kernel", "fc/kernel", "fc/bias")


def adamw(parameters, lr, momentum, weight_decay, nesterov):
    return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)


# settings of config.optim, torch's optimizer, factors on the rates, which are decayed
RECIPES = {
    "plain": ({"momentum": 0.0}, SGD, {}, NAMES),
    "momentum": ({"momentum": 0.8, "weight_decay": 0.3}, SGD, {}, NAMES),
    "nesterov": ({"momentum": 0.8, "nesterov": True, "weight_decay": 0.3}, SGD, {}, NAMES),
    "clipped": ({"clip_norm": 1.0, "weight_decay": 0.3}, SGD, {}, NAMES),
    "adamw": ({"name": "adamw", "weight_decay": 0.3}, adamw, {}, NAMES),
    "kernels": (
        {"name": "adamw", "weight_decay": 0.3, "decay_norm_and_bias": False, "clip_norm": 2.0},
        adamw, {}, ("conv1/kernel", "layer4_0/conv1/kernel", "fc/kernel"),
    ),
    "rates": (
        {"layer_decay": 0.5, "lr_multipliers": ((r"^fc/b", 3.0), ("conv1/", 2.0)), "weight_decay": 0.3}, SGD,
        # stages 0, 1, 4 and 5 are all there are here
        {"conv1/kernel": 2 / 8, "layer1_0/bn1/scale": 1 / 4, "layer4_0/conv1/kernel": 1.0, "fc/bias": 3.0}, NAMES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_updates_are_torchs(name: str) -> None:
    """Parameters after every update, in float64."""
    settings, optimizer_of, factors, decayed = RECIPES[name]
    config = config_module.default()
    config.optim.update({"lr": 0.1, "warmup_epochs": 0.2, "step_epochs": 0.4, "schedule": "step", **settings})
    rng, shapes = np.random.default_rng(0), {"kernel": (3, 2), "scale": (4,), "bias": (2,)}
    values = {path: rng.normal(0, 1, shapes[path.split("/")[-1]]) for path in NAMES}
    tensors = {path: torch.tensor(value, requires_grad=True) for path, value in values.items()}
    with jax.enable_x64(True):
        params = traverse_util.unflatten_dict({path: jnp.asarray(value) for path, value in values.items()}, sep="/")
        rate = make_schedule(config, steps_per_epoch=10, total_steps=UPDATES)
        optimizer = make_optimizer(config, params, rate)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        groups = [
            {"params": [tensors[path]], "weight_decay": config.optim.weight_decay * (path in decayed)} for path in NAMES
        ]
        o = config.optim
        theirs = optimizer_of(groups, lr=0.1, momentum=o.momentum, weight_decay=0.0, nesterov=o.nesterov)
        for number in range(UPDATES):
            grads = {path: rng.normal(0, 0.1 if number % 2 else 1, value.shape) for path, value in values.items()}
            for path, tensor in tensors.items():
                tensor.grad = torch.tensor(grads[path])
            if config.optim.clip_norm:
                torch.nn.utils.clip_grad_norm_(tensors.values(), config.optim.clip_norm)
            for group, path in zip(theirs.param_groups, NAMES, strict=True):  # warm-up over 2, a tenth every 4
                group["lr"] = 0.1 * (0.5, 1, 1, 1, 0.1, 0.1)[number] * factors.get(path, 1.0)
            theirs.step()
            updates, state = update(traverse_util.unflatten_dict(grads, sep="/"), state, params, step=jnp.int32(number))
            params = jax.tree.map(jnp.add, params, updates)
            for path, value in traverse_util.flatten_dict(params, sep="/").items():
                expected = tensors[path].detach().numpy()
                # optax counts Adam's powers of beta in float32
                rtol = 1e-6 if config.optim.name == "adamw" else 1e-12
                np.testing.assert_allclose(value, expected, rtol=rtol, atol=1e-3 * rtol, err_msg=f"{path} {number}")
