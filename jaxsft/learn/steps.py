"""train_step and eval_step: pure functions of one device; `parallel` runs them on all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxsft.data.augment import Amounts, preprocess, train_images
from jaxsft.data.mix import mix
from jaxsft.interpret import metrics, multilabel
from jaxsft.learn.losses import Loss, binary_cross_entropy, cross_entropy
from jaxsft.learn.state import TrainState
from jaxsft.models.stochastic import example_keys
from jaxsft.models.weights import Preprocessing

Batch = dict[str, jax.Array]
Dataset = dict[str, jax.Array]  # {"images": uint8 [N, H, W, 3], "labels": int32 [N] or uint8 [N, K]}, or {}
# In the place of an example's index, of which there are less than 2**31:
MIXING = 2**32 - 1  # the key of what is drawn once a step
MODEL = 2**32 - 2  # the key of what the network draws, which is then divided among the examples


def gather(dataset: Dataset, batch: Batch) -> Batch:
    """The images and labels of batch["example"] (int32 [b]), taken on the device, beside what the batch holds.

    Of batch["partner"], where it is there, too. A batch without a data set on the device brings its own.
    """
    if not dataset:
        return batch
    taken = {"image": dataset["images"][batch["example"]], "label": dataset["labels"][batch["example"]]}
    if "partner" in batch:
        taken["partner_image"] = dataset["images"][batch["partner"]]
        taken["partner_label"] = dataset["labels"][batch["partner"]]
    return {**taken, **batch}


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The key of all that update number `step` draws."""
    return jax.random.fold_in(jax.random.key(seed), step)


def network_keys(key: jax.Array, examples: jax.Array) -> jax.Array:
    """The keys of dropout and stochastic depth, one for each of `examples`, of a step's `key`.

    Of a mixed image it is the first one's.
    """
    return example_keys(jax.random.fold_in(key, MODEL), examples)


def count(logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """What is counted of a batch: `metrics.count` of one label an image, `multilabel.count` of several."""
    return (metrics if labels.ndim == 1 else multilabel).count(logits, labels, losses, mask)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing | None,
    *,
    augmentations: Sequence[str] = (),
    amounts: Amounts = Amounts(),  # noqa: B008  (it is frozen)
    mixup: float = 0.0,
    cutmix: float = 0.0,
    seed: int = 0,
    loss: Loss = cross_entropy,
    accumulate: int = 1,
    ema: float = 0.0,
    axis_name: str | None = None,
) -> Callable[[TrainState, Dataset, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One update: (state, dataset, this device's batch) -> (state, {"loss" sum, "top1", "count"} over all devices).

    Gradients are the mean over the global batch: each device's mean over its equal share, averaged over `axis_name`.
    Running statistics are averaged too. With `accumulate` micro-batches the gradients are averaged before the update;
    batch norm then sees each micro-batch by itself, and so does torch. Without `preprocessing` the images of the
    dataset are the model's input as they are, neither augmented nor normalised. With `mixup` or `cutmix` the batch
    names each example's "partner".
    """

    def input_of(batch: Batch, key: jax.Array, role: str = "example", prefix: str = "") -> jax.Array:
        images, sizes = batch[prefix + "image"], batch.get(prefix + "size")
        if preprocessing is None:
            return images
        return train_images(images, augmentations, preprocessing, key, batch[role], sizes=sizes, amounts=amounts)

    def loss_fn(params: Any, batch_stats: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, tuple[Any, Any]]:
        images = input_of(batch, key)
        if mixup or cutmix:
            partners = input_of(batch, key, "partner", "partner_")
            images, share = mix(jax.random.fold_in(key, MIXING), images, partners, mixup, cutmix)
        keys = network_keys(key, batch["example"])
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(variables, images, train=True, keys=keys, mutable=["batch_stats"])
        losses = loss(logits, batch["label"])
        if mixup or cutmix:
            losses = share * losses + (1 - share) * loss(logits, batch["partner_label"])
        counts = count(logits, batch["label"], losses, jnp.ones_like(losses, bool))
        return losses.mean(), (updated.get("batch_stats", {}), {k: counts[k] for k in ("loss", "top1", "count")})

    def train_step(state: TrainState, dataset: Dataset, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = step_key(seed, state.step)
        grad_fn = jax.grad(loss_fn, has_aux=True)

        def micro_step(batch_stats: Any, micro: Batch) -> tuple[Any, tuple[Any, Any]]:
            grads, (batch_stats, counts) = grad_fn(state.params, batch_stats, gather(dataset, micro), key)
            return batch_stats, (grads, counts)

        def add_micro_step(carry: tuple[Any, Any], micro: Batch) -> tuple[tuple[Any, Any], Any]:
            batch_stats, (grads, counts) = micro_step(carry[0], micro)
            return (batch_stats, jax.tree.map(jnp.add, carry[1], grads)), counts  # one sum, whatever their number

        if accumulate == 1:
            batch_stats, (grads, counts) = micro_step(state.batch_stats, batch)
        else:
            micros = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
            zeros = jax.tree.map(jnp.zeros_like, state.params)
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
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, batch_stats, opt_state, state.average)
        if ema:
            new = new.replace(average=move_average(new.average, new.variables(), ema, state.step))
        return new, counts

    return train_step


def make_several(step: Callable[..., Any]) -> Callable[[TrainState, Dataset, Sequence[Batch]], tuple[TrainState, Any]]:
    """`step` once for each of several batches, in one program: (state, dataset, batches) -> (state, counts [steps]).

    For steps so short that the host's call of each is what takes the time.
    """

    def steps(state: TrainState, dataset: Dataset, batches: Sequence[Batch]) -> tuple[TrainState, Any]:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        return lax.scan(lambda state, batch: step(state, dataset, batch), state, stacked)

    return steps


def move_average(average: Any, values: Any, decay: float, updates: jax.Array) -> Any:
    """decay * average + (1 - decay) * values for floating leaves, after `updates` of it; counters follow `values`.

    As torchvision's ExponentialMovingAverage(use_buffers): batch statistics are averaged with the parameters, and the
    average begins as what the first update makes. (Counters it averages too, each time rounded down.)
    """

    def move(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        return jnp.where(updates == 0, new, decay * old + (1 - decay) * new)

    return jax.tree.map(move, average, values)


def make_eval_step(
    model: nn.Module, preprocessing: Preprocessing | None, *, axis_name: str | None = None
) -> Callable[[Any, Dataset, Batch], dict[str, jax.Array]]:
    """(variables, dataset, this device's batch with "mask") -> `count` summed over all devices.

    The loss is cross-entropy; of several labels an image binary cross-entropy, and besides the sums there are "logits"
    [B, K], "label" uint8 [B, K] and "mask" bool [B] of the examples of all devices, which ranks are made of. Without
    `preprocessing` the images are the model's input as they are.
    """

    def eval_step(variables: Any, dataset: Dataset, batch: Batch) -> dict[str, jax.Array]:
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


def evaluated_logits(model: nn.Module, preprocessing: Preprocessing | None, variables: Any, batch: Batch) -> jax.Array:
    """The logits [b, K] of a batch's images in evaluation."""
    images = batch["image"] if preprocessing is None else preprocess(batch["image"], preprocessing)
    return model.apply(variables, images, train=False)
