"""The JAX side: this project's own model, loss, optimizer and steps, fed with arrays, its results by torch's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from convert import names
from jaxsft import config as config_module
from jaxsft.interpret.metrics import Evaluation
from jaxsft.learn.losses import make_loss
from jaxsft.learn.optim import make_optimizer
from jaxsft.learn.schedule import make_schedule
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_eval_step, make_train_step
from jaxsft.models.families import family_of
from jaxsft.models.family import variable_shapes
from jaxsft.parity.oracle import Arrays, Recipe, Step

CALL = "__call__"
Evaluate = Callable[[Arrays, np.ndarray, np.ndarray], tuple[float, int]]
Losses = dict[str, tuple[float, tuple[float, ...]]]  # name -> (smoothing, class weights)


def variables(model: nn.Module, tensors: Arrays, arch: str) -> dict[str, Any]:
    """torch's tensors as the model's variables, on the device, in the model's dtype."""
    return jax.device_put(names.to_flax(tensors, variable_shapes(model), arch))


def outputs(intermediates: Any, arch: str) -> Arrays:
    """What every module gave, NHWC as torch's NCHW, by torch's name of the module."""
    result, torch_name = {}, family_of(arch).torch_name
    for path, (value,) in names.flatten(intermediates).items():
        module, _, method = path.rpartition("/")
        if method == CALL and module:  # without a module it is the whole network: the logits, which the head gave
            array = np.asarray(value)
            result[torch_name(module)] = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
    return result


def forward(model: nn.Module, arch: str, values: Any, images: np.ndarray, train: bool) -> Arrays:
    """The output of every module."""

    @jax.jit
    def apply(values: Any, images: jax.Array) -> Any:
        mutable = ["batch_stats", "intermediates"]
        return model.apply(values, images, train=train, capture_intermediates=True, mutable=mutable)[1]["intermediates"]

    return outputs(apply(values, images), arch)


def trained(
    model: nn.Module, arch: str, values: Any, images: np.ndarray, labels: np.ndarray, losses: Losses
) -> tuple[Arrays, dict[str, float], Arrays, Arrays]:
    """One pass in training mode: outputs, every loss, the gradient of the first loss, the buffers afterwards."""

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, updated = model.apply(
            {**values, "params": params},
            images,
            train=True,
            capture_intermediates=True,
            mutable=["batch_stats", "intermediates"],
        )
        found = {}
        for name, (smoothing, weights) in losses.items():
            found[name] = make_loss(smoothing, weights)(logits, jnp.asarray(labels)).mean()
        return next(iter(found.values())), (updated, found)

    grads, (updated, found) = jax.jit(jax.grad(loss_fn, has_aux=True))(values["params"])
    return (
        outputs(updated["intermediates"], arch),
        {name: float(value) for name, value in found.items()},
        names.to_torch({"params": grads}, arch),
        names.to_torch({"batch_stats": updated.get("batch_stats", {})}, arch),
    )


def train(
    model: nn.Module, arch: str, values: Any, recipe: Recipe, batches: list[tuple[np.ndarray, np.ndarray]]
) -> Iterator[Step]:
    """`jaxsft.train`'s own optimizer, schedule and step on (images, labels) in turn."""
    config = config_module.default()
    config.optim.update(
        {
            "lr": recipe.lr,
            "momentum": recipe.momentum,
            "nesterov": recipe.nesterov,
            "weight_decay": recipe.weight_decay,
            "clip_norm": recipe.clip_norm,
            "schedule": "cosine",
            "warmup_epochs": float(recipe.warmup(len(batches))),
        }
    )
    rate = make_schedule(config, steps_per_epoch=1, total_steps=len(batches))
    optimizer = make_optimizer(config, values["params"], rate)
    step = jax.jit(make_train_step(model, optimizer, None, loss=make_loss(recipe.smoothing, recipe.class_weights)))
    state = TrainState.create(values, optimizer, with_average=False)
    for number, (images, labels) in enumerate(batches):
        dataset = {"images": images, "labels": labels}
        state, counts = step(state, dataset, {"example": np.arange(len(labels), dtype=np.int32)})
        yield Step(
            float(rate(number)),
            float(counts["loss"] / counts["count"]),
            names.to_torch(state.variables(), arch),
            names.to_torch({"params": optax.tree.get(state.opt_state, "trace")}, arch),
        )


def evaluator(model: nn.Module, arch: str) -> Evaluate:
    """`jaxsft.evaluate`'s own step: (state_dict, images, labels) -> mean loss, how many are right. Compiled once."""
    step = jax.jit(make_eval_step(model, None))

    def evaluate(tensors: Arrays, images: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
        batch = {"example": np.arange(len(labels), dtype=np.int32), "mask": np.ones(len(labels), bool)}
        counts = step(variables(model, tensors, arch), {"images": images, "labels": labels}, batch)
        result = Evaluation.of([jax.device_get(counts)])
        return result.loss, round(result.accuracy * result.count)

    return evaluate
