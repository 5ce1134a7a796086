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
from jaxsft.interpret import metrics, multilabel
from jaxsft.learn import loss_scale
from jaxsft.learn.average import Move, mean_statistics, momenta
from jaxsft.learn.gradient import make_gradient
from jaxsft.learn.losses import binary_cross_entropy, cross_entropy
from jaxsft.learn.objective import Batch, Dataset, Inputs, Objective, gather, network_keys, step_key
from jaxsft.learn.state import TrainState
from jaxsft.models.weights import Preprocessing

Counts = dict[str, jax.Array]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    seed: int | jax.Array = 0,
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
      seed: of all that a step draws, or its key.
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
    model: nn.Module, inputs: Inputs, *, seed: int | jax.Array = 0, axis_name: str | None = None
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
    model: nn.Module,
    preprocessing: Preprocessing | None,
    *,
    logits: bool = False,
    top: int = 0,
    temperature: float = 1.0,
    views: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    number_of_views: int = 1,
) -> Callable[[Any, Dataset, Batch], dict[str, jax.Array]]:
    """(variables, dataset, this device's batch with "mask") -> what the model takes each of its examples for.

    That is "example" int32 [B], its "label" and "loss", float [B], what `metrics.answer` says, or `multilabel.answer`
    of several labels an image, and "mask" bool [B]. The loss is cross-entropy, of several labels binary cross-entropy,
    of the logits as they are; the temperature is in all that is said of probabilities.

    Args:
      model: the network.
      preprocessing: what is left to be done to the images; without it they are the model's input as they are.
      logits: return "logits" [B, K], as they are; of several labels they are there in any case, else with the
        temperature in them.
      top: how many of the most probable classes to return, of one label an image.
      temperature: what logits are divided by before they become probabilities.
      views: (prepared images, a view's number, int32) -> the model's input; probabilities are averaged over the views.
      number_of_views: how many there are.
    """

    def eval_step(variables: Any, dataset: Dataset, batch: Batch) -> dict[str, jax.Array]:
        batch = gather(dataset, batch)
        images = batch["image"] if preprocessing is None else preprocess(batch["image"], preprocessing)
        labels = batch["label"]
        several = labels.ndim == 2
        kind = multilabel if several else metrics
        if views is None:
            scores = model.apply(variables, images, train=False)
            tempered = scores if temperature == 1 else scores / temperature
        else:
            of_view = lambda number: model.apply(variables, views(images, number), train=False)
            each = lax.map(of_view, jnp.arange(number_of_views))
            scores = kind.averaged(each)
            tempered = scores if temperature == 1 else kind.averaged(each / temperature)
        return {
            **{name: batch[name] for name in ("example", "label", "mask")},
            "loss": (binary_cross_entropy if several else cross_entropy)(scores, labels),
            **(multilabel.answer(tempered, labels) if several else metrics.answer(tempered, labels, top)),
            **({"logits": scores if logits else tempered} if logits or several else {}),
        }

    return eval_step


def make_probability_step(
    model: nn.Module,
    preprocessing: Preprocessing | None,
    multi_label: bool = False,
    temperature: float = 1.0,
) -> Callable[[Any, Dataset, Batch], dict[str, jax.Array]]:
    """(variables, dataset, this device's batch with "mask") -> "example", "mask" [B], "probability" float [B, K].

    That is softmax(logits / temperature), of several labels an image the sigmoid.
    """

    def probability_step(variables: Any, dataset: Dataset, batch: Batch) -> dict[str, jax.Array]:
        batch = gather(dataset, batch)
        images = batch["image"] if preprocessing is None else preprocess(batch["image"], preprocessing)
        logits = model.apply(variables, images, train=False) / temperature
        probability = (multilabel if multi_label else metrics).probabilities_of(logits)
        return {"example": batch["example"], "mask": batch["mask"], "probability": probability}

    return probability_step
