"""The features of images, which a frozen body makes and the output layer trains on: a compiled step of evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jaxsft.data.augment import preprocess
from jaxsft.learn.steps import Batch, Dataset, gather
from jaxsft.models.head import entering
from jaxsft.models.weights import Preprocessing


def make_features_step(
    model: nn.Module, head: str, preprocessing: Preprocessing | None
) -> Callable[[Any, Dataset, Batch], dict[str, jax.Array]]:
    """(variables, dataset, this device's batch with "mask") -> "features" [B, C] and "mask" [B].

    They are what the output layer `head` is called with, float32 at least, in evaluation: batch norm on its running
    statistics, no dropout, images prepared as for evaluation. Without `preprocessing` the images are the model's input
    as they are.
    """

    def features_step(variables: Any, dataset: Dataset, batch: Batch) -> dict[str, jax.Array]:
        batch = gather(dataset, batch)
        images = batch["image"] if preprocessing is None else preprocess(batch["image"], preprocessing)
        return {"features": entering(model, head, variables, images).features, "mask": batch["mask"]}

    return features_step
