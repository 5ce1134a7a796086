"""train_step and eval_step: pure functions of one device; `parallel` runs them on all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxsft import metrics
from jaxsft.data.augment import augment, preprocess
from jaxsft.state import TrainState
from jaxsft.weights import Preprocessing

Batch = dict[str, jax.Array]
Dataset = dict[str, jax.Array]  # {"images": uint8 [N, H, W, 3], "labels": int32 [N]}, on the device


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """The loss of each example, [N], as torch.nn.CrossEntropyLoss(label_smoothing=...) before its mean.

    The target is (1 - smoothing) * onehot + smoothing / K (arXiv:1512.00567).
    """
    log_p = jax.nn.log_softmax(logits)
    own = -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return own if not smoothing else (1 - smoothing) * own - smoothing * log_p.mean(1)


def gather(dataset: Dataset, batch: Batch) -> Batch:
    """The images and labels of batch["example"] (int32 [b]), taken on the device, beside what the batch holds."""
    return {"image": dataset["images"][batch["example"]], "label": dataset["labels"][batch["example"]], **batch}


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    *,
    augmentations: Sequence[str] = (),
    seed: int = 0,
    smoothing: float = 0.0,
    accumulate: int = 1,
    ema: float = 0.0,
    axis_name: str | None = None,
) -> Callable[[TrainState, Dataset, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One update: (state, dataset, this device's batch) -> (state, {"loss" sum, "top1", "count"} over all devices).

    Gradients are the mean over the global batch: each device's mean over its equal share, averaged over `axis_name`.
    Running statistics are averaged too. With `accumulate` micro-batches the gradients are averaged before the update;
    batch norm then sees each micro-batch by itself, and so does torch.
    """

    def loss_fn(params: Any, batch_stats: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, tuple[Any, Any]]:
        images = augment(batch["image"].astype(jnp.float32), augmentations, key, batch["example"])
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            preprocess(images, preprocessing),
            train=True,
            mutable=["batch_stats"],
        )
        losses = cross_entropy(logits, batch["label"], smoothing)
        counts = metrics.count(logits, batch["label"], losses, jnp.ones_like(losses, bool))
        return losses.mean(), (updated["batch_stats"], {k: counts[k] for k in ("loss", "top1", "count")})

    def train_step(state: TrainState, dataset: Dataset, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grad_fn = jax.grad(loss_fn, has_aux=True)

        def micro_step(batch_stats: Any, micro: Batch) -> tuple[Any, tuple[Any, Any]]:
            grads, (batch_stats, counts) = grad_fn(state.params, batch_stats, gather(dataset, micro), key)
            return batch_stats, (grads, counts)

        if accumulate == 1:
            batch_stats, (grads, counts) = micro_step(state.batch_stats, batch)
        else:
            micros = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
            batch_stats, (all_grads, all_counts) = lax.scan(micro_step, state.batch_stats, micros)
            grads = jax.tree.map(lambda g: g.mean(0), all_grads)
            counts = jax.tree.map(lambda c: c.sum(0), all_counts)
        if axis_name is not None:
            grads = lax.pmean(grads, axis_name)
            counts = lax.psum(counts, axis_name)
            # Under "local" batch norm every device has moved its own copy; one state needs one, and the mean keeps
            # them all (torch's DistributedDataParallel keeps rank 0's). Counters are equal everywhere.
            batch_stats = jax.tree.map(
                lambda x: lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x, batch_stats
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, batch_stats, opt_state, state.average)
        if ema:
            new = new.replace(average=move_average(new.average, new.variables(), ema))
        return new, counts

    return train_step


def move_average(average: Any, values: Any, decay: float) -> Any:
    """decay * average + (1 - decay) * values for floating leaves; counters follow `values`.

    Batch statistics are averaged with the parameters, as torchvision's ExponentialMovingAverage(use_buffers) does.
    """

    def move(old: jax.Array, new: jax.Array) -> jax.Array:
        return decay * old + (1 - decay) * new if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(move, average, values)


def make_eval_step(
    model: nn.Module, preprocessing: Preprocessing, *, axis_name: str | None = None
) -> Callable[[Any, Dataset, Batch], dict[str, jax.Array]]:
    """(variables, dataset, this device's batch with "mask") -> `metrics.count` summed over all devices."""

    def eval_step(variables: Any, dataset: Dataset, batch: Batch) -> dict[str, jax.Array]:
        batch = gather(dataset, batch)
        logits = model.apply(variables, preprocess(batch["image"], preprocessing), train=False)
        counts = metrics.count(logits, batch["label"], cross_entropy(logits, batch["label"]), batch["mask"])
        return counts if axis_name is None else lax.psum(counts, axis_name)

    return eval_step
