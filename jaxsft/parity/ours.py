"""The JAX side: this project's own model, loss, optimizer and steps, fed with arrays, its results by torch's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from convert import names
from jaxsft import config as config_module
from jaxsft.interpret.metrics import Evaluation
from jaxsft.learn.losses import make_loss
from jaxsft.learn.objective import Inputs, Objective, network_keys, step_key
from jaxsft.learn.optim import make_optimizer
from jaxsft.learn.schedule import make_schedule
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_eval_step, make_train_step
from jaxsft.models.families import family_of
from jaxsft.models.family import IMAGE_SIZE, ImageSize, variable_shapes
from jaxsft.models.stochastic import MASKS
from jaxsft.parity.networks import Masks
from jaxsft.parity.oracle import Arrays, Batches, Recipe, Step

CALL = "__call__"
SEED = 0  # of what the network draws
Evaluate = Callable[[Arrays, np.ndarray, np.ndarray], tuple[float, int]]
Losses = dict[str, tuple[float, tuple[float, ...]]]  # name -> (smoothing, class weights)


def variables(model: nn.Module, tensors: Arrays, arch: str, image_size: ImageSize = IMAGE_SIZE) -> dict[str, Any]:
    """torch's tensors as the model's variables, on the device, in the model's dtype."""
    return jax.device_put(names.to_flax(tensors, variable_shapes(model, image_size), arch))


def outputs(intermediates: Any, arch: str) -> Arrays:
    """What every module that is called once gave, by torch's name of it."""
    result, torch_name = {}, family_of(arch).torch_name
    for path, values in names.flatten(intermediates).items():
        module, _, method = path.rpartition("/")
        # Without a module it is the whole network: the logits, which the head gave.
        if method == CALL and module and len(values) == 1:
            result[torch_name(module)] = np.asarray(values[0])
    return result


def kept(masks: Any, arch: str) -> Masks:
    """What dropout and stochastic depth keep, a mask a call, by torch's name of the module."""
    torch_name = family_of(arch).torch_name
    found = {torch_name(path.rpartition("/")[0]): values for path, values in names.flatten(masks).items()}
    return {name: tuple(np.asarray(value) for value in values) for name, values in found.items()}


def drawer(model: nn.Module, arch: str, values: Any) -> Callable[[np.ndarray, int], Masks]:
    """(images, number of an update) -> what training keeps in it of examples 0, 1, ..."""

    @jax.jit
    def draw(values: Any, images: jax.Array, step: jax.Array) -> Any:
        keys = network_keys(step_key(SEED, step), jnp.arange(len(images)))
        mutable = ["batch_stats", MASKS]
        return model.apply(values, images, train=True, keys=keys, mutable=mutable)[1].get(MASKS, {})

    return lambda images, step: kept(draw(values, images, jnp.int32(step)), arch)


def forward(model: nn.Module, arch: str, values: Any, images: np.ndarray, train: bool) -> Arrays:
    """The output of every module."""

    @jax.jit
    def apply(values: Any, images: jax.Array) -> Any:
        mutable = ["batch_stats", "intermediates"]
        return model.apply(values, images, train=train, capture_intermediates=True, mutable=mutable)[1]["intermediates"]

    return outputs(apply(values, images), arch)


class Pass(NamedTuple):
    """What one pass in training gave, by torch's names."""

    outputs: Arrays
    losses: dict[str, float]
    gradients: Arrays  # of the first loss
    buffers: Arrays  # afterwards
    masks: Masks


def trained(model: nn.Module, arch: str, values: Any, images: np.ndarray, labels: np.ndarray, losses: Losses) -> Pass:
    """One pass in training mode, of examples 0, 1, ... in the first update."""
    keys = network_keys(step_key(SEED, jnp.int32(0)), jnp.arange(len(images)))

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, updated = model.apply(
            {**values, "params": params},
            images,
            train=True,
            keys=keys,
            capture_intermediates=True,
            mutable=["batch_stats", "intermediates", MASKS],
        )
        found = {}
        for name, (smoothing, weights) in losses.items():
            found[name] = make_loss(smoothing, weights)(logits, jnp.asarray(labels)).mean()
        return next(iter(found.values())), (updated, found)

    grads, (updated, found) = jax.jit(jax.grad(loss_fn, has_aux=True))(values["params"])
    return Pass(
        outputs(updated["intermediates"], arch),
        {name: float(value) for name, value in found.items()},
        names.to_torch({"params": grads}, arch),
        names.to_torch({"batch_stats": updated.get("batch_stats", {})}, arch),
        kept(updated.get(MASKS, {}), arch),
    )


def train(model: nn.Module, arch: str, values: Any, recipe: Recipe, batches: Batches) -> Iterator[Step]:
    """`jaxsft.train`'s own optimizer, schedule and step on batches in turn."""
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
    objective = Objective(model, Inputs(None), make_loss(recipe.smoothing, recipe.class_weights))
    step = jax.jit(make_train_step(objective, optimizer, seed=SEED))
    state = TrainState.create(values, optimizer)
    for number, (images, labels, _) in enumerate(batches):
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
        answers = step(variables(model, tensors, arch, images.shape[1:3]), {"images": images, "labels": labels}, batch)
        result = Evaluation.of([jax.device_get(answers)], model.num_classes)
        return result.loss, round(result.accuracy * result.count)

    return evaluate
