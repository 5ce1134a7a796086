"""What an update minimises: from a batch of one device to its loss, and what of the batch is counted."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxsft.data.augment import Amounts, train_images
from jaxsft.data.mix import mix
from jaxsft.interpret import metrics, multilabel
from jaxsft.learn.distill import Teacher
from jaxsft.learn.fixmatch import FixMatch, strong
from jaxsft.learn.losses import Loss, cross_entropy
from jaxsft.models.stochastic import example_keys
from jaxsft.models.weights import Preprocessing

Batch = dict[str, jax.Array]
# On the device: {"images": uint8 [N, H, W, 3], "labels": int32 [N] or uint8 [N, K]}, or neither where batches bring
# their pixels; "unlabelled_images", the same of the unlabelled ones; "teacher", its variables.
Dataset = dict[str, Any]
# In the place of an example's index, of which there are less than 2**31:
MIXING = 2**32 - 1  # the key of what is drawn once a step
MODEL = 2**32 - 2  # the key of what the network draws, which is then divided among the examples
WEAK, STRONG = 2**32 - 3, 2**32 - 4  # the keys of the two views of unlabelled images
PLACES = (("example", "image", "images"), ("partner", "partner_image", "images"),
          ("unlabelled_example", "unlabelled_image", "unlabelled_images"))  # fmt: skip


def gather(dataset: Dataset, batch: Batch) -> Batch:
    """The images and labels of batch["example"] (int32 [b]), taken on the device, beside what the batch holds.

    Of batch["partner"] and batch["unlabelled_example"], where they are there, too. A batch without a data set on the
    device brings its own.
    """
    taken = {image: dataset[images][batch[at]] for at, image, images in PLACES if at in batch and images in dataset}
    if "labels" in dataset:
        roles = {"example": "label", "partner": "partner_label"}
        taken |= {label: dataset["labels"][batch[role]] for role, label in roles.items() if role in batch}
    return {**taken, **batch}


def step_key(seed: int | jax.Array, step: jax.Array) -> jax.Array:
    """The key of all that update number `step` draws; `seed` a number, or the key that it makes."""
    is_key = jnp.issubdtype(getattr(seed, "dtype", int), jax.dtypes.prng_key)
    return jax.random.fold_in(seed if is_key else jax.random.key(seed), step)


def network_keys(key: jax.Array, examples: jax.Array) -> jax.Array:
    """The keys of dropout and stochastic depth, one for each of `examples`, of a step's `key`.

    Of a mixed image it is the first one's.
    """
    return example_keys(jax.random.fold_in(key, MODEL), examples)


def count(logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """What is counted of a batch: `metrics.count` of one label an image, `multilabel.count` of several."""
    return (metrics if labels.ndim == 1 else multilabel).count(logits, labels, losses, mask)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How a batch's images become the model's input in training.

    Without `preprocessing` the images are that as they are, neither augmented nor normalised.
    """

    preprocessing: Preprocessing | None
    augmentations: tuple[str, ...] = ()
    amounts: Amounts = dataclasses.field(default_factory=Amounts)

    def __call__(self, batch: Batch, key: jax.Array, role: str = "example", prefix: str = "") -> jax.Array:
        """float32 [b, H, W, 3] of batch[prefix + "image"], whose numbers are batch[role]; `key` is the step's."""
        images, sizes = batch[prefix + "image"], batch.get(prefix + "size")
        if self.preprocessing is None:
            return images
        to, names = self.preprocessing, self.augmentations
        return train_images(images, names, to, key, batch[role], sizes=sizes, amounts=self.amounts)

    def strongly(self) -> Inputs:
        """The same for the strong view of unlabelled images (see `fixmatch.strong`), always erased."""
        amounts = dataclasses.replace(self.amounts, erasing=1.0)
        return dataclasses.replace(self, augmentations=strong(self.augmentations), amounts=amounts)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What training minimises: the mean loss of the labelled images, and what is added to it.

    With `mixup` or `cutmix` the batch names each example's "partner": the loss is that of both labels in their shares,
    which for cross-entropy is the loss of the mixed labels. A `teacher`'s answers take its share of the loss. With
    `fixmatch` the batch has unlabelled images: they go through the network together with the labelled ones, whose batch
    norm they share.
    """

    model: nn.Module
    inputs: Inputs
    loss: Loss = cross_entropy
    mixup: float = 0.0
    cutmix: float = 0.0
    teacher: Teacher | None = None
    fixmatch: FixMatch | None = None
    unlabelled: Inputs | None = None  # of the unlabelled images, weakly augmented; None: as of the others

    @classmethod
    def of(
        cls,
        config: ConfigDict,
        model: nn.Module,
        preprocessing: Preprocessing | None,
        loss: Loss,
        teacher: Teacher | None = None,
        of_unlabelled: Preprocessing | None = None,
    ) -> Objective:
        """What a run's config asks for.

        Args:
          config: of the run.
          model: to be trained.
          preprocessing, of_unlabelled: what is left to be done on the device to the images of either kind.
          loss: of train.loss, as `loss_of` makes it.
          teacher: of train.teacher.
        """
        train, data = config.train, config.data
        fixmatch = FixMatch(train.fixmatch_threshold, train.fixmatch_weight) if data.unlabelled else None
        inputs = Inputs(preprocessing, tuple(data.augment), Amounts.of(config))
        unlabelled = dataclasses.replace(inputs, preprocessing=of_unlabelled) if fixmatch else None
        return cls(model, inputs, loss, train.mixup, train.cutmix, teacher, fixmatch, unlabelled)

    def __call__(
        self, params: Any, batch_stats: Any, dataset: Dataset, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """The mean loss of a batch, float scalar; its new batch statistics and its counts.

        The counts are sums: "loss" of the labelled images, "top1", "count"; with unlabelled ones "unlabelled", their
        number, and "confident", how many of them were given a label.
        """
        batch = gather(dataset, batch)
        images, examples = self.inputs(batch, key), batch["example"]
        mixes, share = bool(self.mixup or self.cutmix), jnp.ones(())
        if mixes:
            partners = self.inputs(batch, key, "partner", "partner_")
            images, share = mix(jax.random.fold_in(key, MIXING), images, partners, self.mixup, self.cutmix)
        keys = network_keys(key, examples)
        views: tuple[jax.Array, ...] = ()
        if self.fixmatch:
            weak_key, strong_key = jax.random.fold_in(key, WEAK), jax.random.fold_in(key, STRONG)
            names = "unlabelled_example", "unlabelled_"
            weakly = self.unlabelled or self.inputs
            views = weakly(batch, weak_key, *names), weakly.strongly()(batch, strong_key, *names)
            unlabelled = (network_keys(k, batch[names[0]]) for k in (weak_key, strong_key))
            keys = jnp.concatenate([keys, *unlabelled])
        logits, updated = self.model.apply(
            {"params": params, "batch_stats": batch_stats},
            jnp.concatenate([images, *views]) if views else images,
            train=True,
            keys=keys,
            mutable=["batch_stats"],
        )
        own = logits[: len(examples)]
        losses = self.loss(own, batch["label"])
        if mixes:
            losses = share * losses + (1 - share) * self.loss(own, batch["partner_label"])
        if self.teacher:
            targets = self.teacher.logits(dataset["teacher"], images, self.inputs.preprocessing)
            losses = (1 - self.teacher.weight) * losses + self.teacher.weight * self.teacher.loss(own, targets)
        counts = count(own, batch["label"], losses, jnp.ones_like(losses, bool))
        sums = {name: counts[name] for name in ("loss", "top1", "count")}
        total = losses.mean()
        if self.fixmatch:
            more, is_sure = self.fixmatch.loss(*jnp.split(logits[len(examples) :], 2))
            total += self.fixmatch.weight * more.mean()
            sums |= {"confident": is_sure.sum(dtype=jnp.int32), "unlabelled": jnp.int32(len(is_sure))}
        return total, (updated.get("batch_stats", {}), sums)
