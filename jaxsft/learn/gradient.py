"""The gradient of an update: over micro-batches and devices, scaled for float16, and where it is steepest (SAM)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax import lax

from jaxsft.learn.objective import Batch, Dataset, Objective
from jaxsft.learn.state import TrainState

# (state, dataset, this device's batch, key of the step) -> gradients, batch statistics, counts, the same on all devices
Gradient = Callable[[TrainState, Dataset, Batch, jax.Array], tuple[Any, Any, dict[str, jax.Array]]]


def make_gradient(
    objective: Objective,
    *,
    accumulate: int = 1,
    sam: float = 0.0,
    frozen: Collection[str] = (),
    axis_name: str | None = None,
) -> Gradient:
    """The gradient of the mean loss over the global batch: each device's mean over its equal share, averaged.

    With `accumulate` micro-batches the gradients are averaged before the update; batch norm then sees each micro-batch
    by itself, and so does torch. Running statistics are averaged over the devices, too. Where the state has a loss
    scale, the loss is multiplied by it and the gradients divided.

    Args:
      objective: what is minimised.
      accumulate: micro-batches.
      sam: rho of sharpness-aware minimisation (Foret et al. 2020, arXiv:2010.01412), 0 = off: the gradient is taken at
        params + rho * g / |g|, where g is the gradient at params, of the whole batch on all devices. Batch statistics
        and counts are those of the first pass.
      frozen: paths of the parameters that do not train: their gradient is 0, is not computed, and no device sends it.
      axis_name: of the devices.
    """

    def at(params: Any, state: TrainState, dataset: Dataset, batch: Batch, key: jax.Array) -> tuple[Any, Any, Any]:
        scale = None if state.loss_scale is None else state.loss_scale["scale"]
        flat = traverse_util.flatten_dict(params, sep="/")
        still = {path: leaf for path, leaf in flat.items() if path in frozen}
        trained = {path: leaf for path, leaf in flat.items() if path not in frozen}

        def scaled(trained: Any, *arguments: Any) -> tuple[jax.Array, Any]:
            whole = traverse_util.unflatten_dict({**still, **trained}, sep="/")
            loss, more = objective(whole, *arguments)
            return loss if scale is None else loss * scale, more

        def micro_step(batch_stats: Any, micro: Batch) -> tuple[Any, tuple[Any, Any]]:
            grads, (batch_stats, counts) = jax.grad(scaled, has_aux=True)(trained, batch_stats, dataset, micro, key)
            return batch_stats, (grads, counts)

        def add_micro_step(carry: tuple[Any, Any], micro: Batch) -> tuple[tuple[Any, Any], Any]:
            batch_stats, (grads, counts) = micro_step(carry[0], micro)
            return (batch_stats, jax.tree.map(jnp.add, carry[1], grads)), counts  # one sum, whatever their number

        if accumulate == 1:
            batch_stats, (grads, counts) = micro_step(state.batch_stats, batch)
        else:
            micros = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
            zeros = jax.tree.map(jnp.zeros_like, trained)
            (batch_stats, total), all_counts = lax.scan(add_micro_step, (state.batch_stats, zeros), micros)
            grads = jax.tree.map(lambda g: g / accumulate, total)
            counts = jax.tree.map(lambda c: c.sum(0), all_counts)
        if axis_name is not None:
            grads = lax.pmean(grads, axis_name)
            counts = lax.psum(counts, axis_name)
            # Under "local" batch norm every device has moved its own copy; one state needs one, and the mean keeps
            # them all (torch's DistributedDataParallel keeps rank 0's). Counters are equal everywhere.
            batch_stats = jax.tree.map(
                lambda x: lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x, batch_stats
            )
        grads = grads if scale is None else jax.tree.map(lambda g: g / scale, grads)
        grads |= {path: jnp.zeros_like(leaf) for path, leaf in still.items()}
        return traverse_util.unflatten_dict(grads, sep="/"), batch_stats, counts

    def gradient(state: TrainState, dataset: Dataset, batch: Batch, key: jax.Array) -> tuple[Any, Any, Any]:
        grads, batch_stats, counts = at(state.params, state, dataset, batch, key)
        if sam:
            grads, _, _ = at(ascended(state.params, grads, sam), state, dataset, batch, key)
        return grads, batch_stats, counts

    return gradient


def ascended(params: Any, grads: Any, rho: float) -> Any:
    """params + rho * grads / |grads|, the norm over all of them together; where that is 0, params."""
    norm = optax.tree.norm(grads)
    factor = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)
    return jax.tree.map(lambda p, g: p + (factor * g).astype(p.dtype), params, grads)
