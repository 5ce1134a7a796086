"""Averages of a run's parameters, evaluated and kept in the place of the last ones: over updates, or over epochs.

The exponential moving average (EMA) averages batch statistics with the parameters, as torchvision's
ExponentialMovingAverage(use_buffers) does. The mean over the last epochs (SWA) has none that fit it: they are estimated
anew over the training images before it is evaluated, as torch.optim.swa_utils.update_bn does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax
from ml_collections import ConfigDict

from jaxsft.models.layers import BatchNorm

Move = Callable[[Any, Any, jax.Array], Any]  # (average, values after an update, updates made before it) -> average


def average_of(config: ConfigDict, first: Any, every: Any) -> Move | None:
    """What a run's config asks for, `first` and `every` as for `swa`; None: no average."""
    if config.train.ema:
        return ema(config.train.ema, config.train.ema_warmup)
    return swa(first, every) if config.train.swa_epochs else None


def ema(decay: float, warmup: bool = False) -> Move:
    """decay * average + (1 - decay) * values after each update; it begins as what the first update makes.

    With `warmup` the decay of update t = 0, 1, ... is min(decay, (1 + t) / (10 + t)), so that a short run's average
    does not cling to its start (TensorFlow's ExponentialMovingAverage with num_updates). Counters are the values' own;
    torchvision averages these too, each time rounded down.
    """

    def move(average: Any, values: Any, updates: jax.Array) -> Any:
        t = updates.astype(float)
        rate = jnp.minimum(jnp.asarray(decay, float), (1 + t) / (10 + t)) if warmup else decay

        def one(old: jax.Array, new: jax.Array) -> jax.Array:
            if not jnp.issubdtype(new.dtype, jnp.floating):
                return new
            return jnp.where(updates == 0, new, (rate * old + (1 - rate) * new).astype(new.dtype))

        return jax.tree.map(one, average, values)

    return move


def swa(first: Any, every: Any) -> Move:
    """The mean of the parameters after `first` updates (see `swa_start`) and after each `every` more, an epoch's.

    Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407), with torch.optim.swa_utils.AveragedModel's
    arithmetic: average + (values - average) / (n + 1). Before the first of them the average is the values themselves;
    batch statistics are always these. Both are ints, or int32 scalars.
    """

    def move(average: Any, values: Any, updates: jax.Array) -> Any:
        done = updates + 1
        earlier = (done - first) // every  # ends that the average holds, where this is one, too
        is_end = (done >= first) & ((done - first) % every == 0)

        def one(old: jax.Array, new: jax.Array) -> jax.Array:
            moved = old + (new - old) / (earlier + 1).astype(new.dtype)
            return jnp.where(done <= first, new, jnp.where(is_end, moved, old))

        return {**values, "params": jax.tree.map(one, average["params"], values["params"])}

    return move


def swa_start(total: int, every: int, epochs: int) -> int:
    """The number of updates after which the mean over the last `epochs` epochs takes the parameters for the first time.

    Ends of epochs are counted from the run's own: `total` updates, `total` - `every` and so on.
    """
    ends = min(epochs, (total - 1) // every + 1)
    return total - (ends - 1) * every


def momenta(model: nn.Module, variables: Any, images: Any) -> dict[str, float]:
    """The momentum of each batch norm of `model`, by its path."""
    found: dict[str, float] = {}

    def note(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, BatchNorm):
            found["/".join(context.module.path)] = context.module.momentum
        return following(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    return found


def mean_statistics(old: Any, updated: Any, momenta: dict[str, float], seen: jax.Array, axis_name: str | None) -> Any:
    """The mean of the batch statistics of `seen` batches and one more, as torch's update_bn makes it.

    Args:
      old: the mean over the batches seen, "batch_stats"; before the first anything.
      updated: what training on the next batch made of them, running = (1 - m) * running + m * batch, from which the
        batch's own are taken back; norms that are frozen have not moved, and stay.
      momenta: m of each norm, by its path.
      seen: int32 scalar.
      axis_name: of the devices that the batch is split over.
    """
    before = traverse_util.flatten_dict(old, sep="/")
    after = traverse_util.flatten_dict(updated, sep="/")
    for path, value in after.items():
        if jnp.issubdtype(value.dtype, jnp.floating):
            m = momenta[path.rpartition("/")[0]]
            own = (value - (1 - m) * before[path]) / m
            own = own if axis_name is None else lax.pmean(own, axis_name)
            after[path] = before[path] + (own - before[path]) / (seen + 1).astype(value.dtype)
    return traverse_util.unflatten_dict(after, sep="/")
