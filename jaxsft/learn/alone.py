"""A step of the output layer alone, in the state of the whole network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import Batch, Dataset

Step = Callable[[TrainState, Dataset, Batch], tuple[TrainState, dict[str, jax.Array]]]


def step_alone(
    make: Callable[[optax.GradientTransformation], Step], optimizer: optax.GradientTransformation, layer: str
) -> Step:
    """The step that `make` makes with an optimizer, for the parameters params[layer] of the state alone.

    All else in the state goes through as it is: donated, it costs nothing, and on several devices no gradients of it,
    all zeros, are averaged. A moving average of it would be itself.

    Args:
      make: as `make_train_step`, for a model that takes these parameters alone.
      optimizer: of the whole network, whose state the state holds; all but the layer is frozen in it.
      layer: path of the output layer.
    """

    def part(variables: dict[str, Any]) -> dict[str, Any]:
        return {"params": {layer: variables["params"][layer]}, "batch_stats": {}}

    def step(state: TrainState, dataset: Dataset, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        zeros = jax.tree.map(jnp.zeros_like, state.params)  # for what is frozen; never computed with

        def update(grads: Any, opt_state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            whole = {**state.params, **params}
            updates, opt_state = optimizer.update({**zeros, **grads}, opt_state, whole, **extra)
            return {layer: updates[layer]}, opt_state

        own = make(optax.GradientTransformationExtraArgs(optimizer.init, update))
        average = None if state.average is None else part(state.average)
        before = state.replace(**part(state.variables()), average=average)
        after, counts = own(before, dataset, batch)
        if state.average is not None:
            params = {**state.average["params"], **after.average["params"]}
            after = after.replace(average={**state.average, "params": params})
        return after.replace(params={**state.params, **after.params}, batch_stats=state.batch_stats), counts

    return step
