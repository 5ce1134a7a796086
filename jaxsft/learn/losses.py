"""What is minimised: a loss of each example, in torch's definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

Loss = Callable[[jax.Array, jax.Array], jax.Array]  # logits [N, K], labels int32 [N] -> the loss of each example, [N]


def loss_of(config: ConfigDict, axis_name: str | None) -> Loss:
    """The loss that a run's config asks for; `axis_name` as for `make_loss`."""
    return make_loss(config.train.label_smoothing, tuple(config.train.class_weights), axis_name)


def make_loss(smoothing: float = 0.0, class_weights: Sequence[float] = (), axis_name: str | None = None) -> Loss:
    """The loss that training minimises the mean of.

    Args:
      smoothing: share of each label that is spread over all classes.
      class_weights: a factor for each class; (): none.
      axis_name: of the devices that the batch is split over.
    """

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        losses = cross_entropy(logits, labels, smoothing, class_weights)
        return losses / mean_weight(labels, class_weights, axis_name) if class_weights else losses

    return loss


def cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, class_weights: Sequence[float] = ()
) -> jax.Array:
    """The loss of each example, [N]: torch.nn.CrossEntropyLoss(weight, label_smoothing=..., reduction="none").

    The target is (1 - smoothing) * onehot + smoothing / K (arXiv:1512.00567); a class's weight multiplies its term of
    -log p, also in the smoothed part. torch's reduction="mean" is the sum of these over the sum of weight[label].
    """
    log_p = jax.nn.log_softmax(logits)
    if class_weights:
        log_p = log_p * jnp.asarray(class_weights, log_p.dtype)
    own = -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return own if not smoothing else (1 - smoothing) * own - smoothing * log_p.mean(1)


def mean_weight(labels: jax.Array, class_weights: Sequence[float], axis_name: str | None) -> jax.Array:
    """The mean of class_weights[label] over the global batch: losses divided by it average to torch's weighted mean."""
    mean = jnp.asarray(class_weights)[labels].mean()
    return mean if axis_name is None else lax.pmean(mean, axis_name)
