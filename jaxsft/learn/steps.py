"""The compiled steps: pure functions of one device, which `parallel` runs on all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxsft.data.augment import preprocess
from jaxsft.learn import loss_scale
from jaxsft.learn.average import Move, mean_statistics, momenta
from jaxsft.learn.gradient import make_gradient
from jaxsft.learn.losses import binary_cross_entropy, cross_entropy
from jaxsft.learn.objective import Batch, Dataset, Inputs, Objective, count, gather, network_keys, step_key
from jaxsft.learn.state import TrainState
from jaxsft.models.weights import Preprocessing

Counts = dict[str, jax.Array]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    seed: int = 0,
    accumulate: int = 1,
    sam: float = 0.0,
    frozen: Collection[str] = (),
    average: Move | None = None,
    axis_name: str | None = None,
) -> Callable[[TrainState, Dataset, Batch], tuple[TrainState, Counts]]:
    """One update: (state, dataset, this device's batch) -> (state, the objective's counts over all devices).

    Where the state has a loss scale, an update whose gradients are not finite changes nothing but that and the number
    of updates made, and counts as 1 "skipped".

    Args:
      objective: what is minimised.
      optimizer: gradients to updates.
      seed: of all that a step draws.
      accumulate, sam, frozen, axis_name: as for `make_gradient`.
      average: how the state's average moves, where it has one.
    """
    gradient = make_gradient(objective, accumulate=accumulate, sam=sam, frozen=frozen, axis_name=axis_name)

    def train_step(state: TrainState, dataset: Dataset, batch: Batch) -> tuple[TrainState, Counts]:
        grads, batch_stats, counts = gradient(state, dataset, batch, step_key(seed, state.step))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_state)
        if average is not None:
            new = new.replace(average=average(state.average, new.variables(), state.step))
        if state.loss_scale is not None:
            finite = loss_scale.all_finite(grads)
            new = jax.tree.map(lambda changed, old: jnp.where(finite, changed, old), new, state)
            new = new.replace(loss_scale=loss_scale.adjusted(state.loss_scale, finite))
            counts["skipped"] = (~finite).astype(jnp.int32)
        return new.replace(step=state.step + 1), counts

    return train_step


def make_several(step: Callable[..., Any]) -> Callable[[TrainState, Dataset, Sequence[Batch]], tuple[TrainState, Any]]:
    """`step` once for each of several batches, in one program: (state, dataset, batches) -> (state, counts [steps]).

    For steps so short that the host's call of each is what takes the time.
    """

    def steps(state: TrainState, dataset: Dataset, batches: Sequence[Batch]) -> tuple[TrainState, Any]:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        return lax.scan(lambda state, batch: step(state, dataset, batch), state, stacked)

    return steps


def make_statistics_step(
    model: nn.Module, inputs: Inputs, *, seed: int = 0, axis_name: str | None = None
) -> Callable[[dict[str, Any], Dataset, Batch], dict[str, Any]]:
    """(variables with "seen", int32, dataset, this device's batch) -> the same, with the batch seen.

    Their batch statistics become the mean of those that training would have of each batch (see `mean_statistics`).
    """

    def statistics_step(average: dict[str, Any], dataset: Dataset, batch: Batch) -> dict[str, Any]:
        batch, seen = gather(dataset, batch), average["seen"]
        key, variables = step_key(seed, seen), {name: average[name] for name in ("params", "batch_stats")}
        images, keys = inputs(batch, key), network_keys(key, batch["example"])
        _, updated = model.apply(variables, images, train=True, keys=keys, mutable=["batch_stats"])
        old, rates = average["batch_stats"], momenta(model, variables, images)
        batch_stats = mean_statistics(old, updated.get("batch_stats", {}), rates, seen, axis_name)
        return {**average, "batch_stats": batch_stats, "seen": seen + 1}

    return statistics_step


def make_eval_step(
    model: nn.Module, preprocessing: Preprocessing | None, *, axis_name: str | None = None
) -> Callable[[Any, Dataset, Batch], Counts]:
    """(variables, dataset, this device's batch with "mask") -> `count` summed over all devices.

    The loss is cross-entropy; of several labels an image binary cross-entropy, and besides the sums there are "logits"
    [B, K], "label" uint8 [B, K] and "mask" bool [B] of the examples of all devices, which ranks are made of. Without
    `preprocessing` the images are the model's input as they are.
    """

    def eval_step(variables: Any, dataset: Dataset, batch: Batch) -> Counts:
        batch = gather(dataset, batch)
        logits = evaluated_logits(model, preprocessing, variables, batch)
        several = batch["label"].ndim == 2
        losses = (binary_cross_entropy if several else cross_entropy)(logits, batch["label"])
        counts = count(logits, batch["label"], losses, batch["mask"])
        each = {"logits": logits, "label": batch["label"], "mask": batch["mask"]} if several else {}
        if axis_name is not None:
            counts, each = lax.psum(counts, axis_name), lax.all_gather(each, axis_name, tiled=True)
        return {**counts, **each}

    return eval_step


def make_answer_step(
    model: nn.Module, preprocessing: Preprocessing | None, *, axis_name: str | None = None
) -> Callable[[Any, Dataset, Batch], dict[str, jax.Array]]:
    """(variables, dataset, this device's batch with "mask") -> what the model takes each example of all devices for.

    That is "example", "label" and "predicted" int32 [B], the "probability" of the latter, float [B], and "mask" bool
    [B]. Of equal logits the first counts, as in `metrics.count`. Of several labels an image "label" and "predicted" are
    uint8 [B, K] (a probability above 0.5), and "probability" is that of the label which is furthest from what it is.
    """

    def answer_step(variables: Any, dataset: Dataset, batch: Batch) -> dict[str, jax.Array]:
        batch = gather(dataset, batch)
        logits = evaluated_logits(model, preprocessing, variables, batch)
        if batch["label"].ndim == 2:
            has = batch["label"] > 0
            predicted, probability = (logits > 0).astype(jnp.uint8), jax.nn.sigmoid(jnp.where(has, -logits, logits))
        else:
            probability = jax.nn.softmax(logits)
            predicted = probability.argmax(1).astype(jnp.int32)
        answers = {
            **{name: batch[name] for name in ("example", "label", "mask")},
            "predicted": predicted,
            "probability": probability.max(1),
        }
        return answers if axis_name is None else lax.all_gather(answers, axis_name, tiled=True)

    return answer_step


def make_probability_step(
    model: nn.Module,
    preprocessing: Preprocessing | None,
    multi_label: bool = False,
    temperature: float = 1.0,
    *,
    axis_name: str | None = None,
) -> Callable[[Any, Dataset, Batch], dict[str, jax.Array]]:
    """(variables, dataset, this device's batch with "mask") -> "example", "mask" [B], "probability" float [B, K].

    Of the examples of all devices: softmax(logits / temperature), of several labels an image the sigmoid.
    """

    def probability_step(variables: Any, dataset: Dataset, batch: Batch) -> dict[str, jax.Array]:
        batch = gather(dataset, batch)
        logits = evaluated_logits(model, preprocessing, variables, batch) / temperature
        probability = jax.nn.sigmoid(logits) if multi_label else jax.nn.softmax(logits)
        answers = {"example": batch["example"], "mask": batch["mask"], "probability": probability}
        return answers if axis_name is None else lax.all_gather(answers, axis_name, tiled=True)

    return probability_step


def evaluated_logits(model: nn.Module, preprocessing: Preprocessing | None, variables: Any, batch: Batch) -> jax.Array:
    """The logits [b, K] of a batch's images in evaluation."""
    images = batch["image"] if preprocessing is None else preprocess(batch["image"], preprocessing)
    return model.apply(variables, images, train=False)
