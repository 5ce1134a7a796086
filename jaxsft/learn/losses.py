"""What is minimised: a loss of each example, in torch's definition.

Labels are int32 [N], a class each, or of images with several labels uint8 [N, K], 1 where an image has the label. Of
mixed images `steps` takes the mix of the losses of both images' labels, in their shares: for cross-entropy and for bce
that is the loss of the mixed soft labels, for focal, which is not linear in the labels, the definition that fastai has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict

Loss = Callable[[jax.Array, jax.Array], jax.Array]  # logits [N, K], labels -> the loss of each example, [N]


def loss_of(config: ConfigDict, axis_name: str | None, class_weights: Sequence[float] | None = None) -> Loss:
    """The loss that a run's config asks for.

    Args:
      config: of the run.
      axis_name: as for `make_loss`.
      class_weights: those of the config as numbers (see `numeric_weights`); None: they are numbers there.
    """
    train = config.train
    weights = tuple(train.class_weights if class_weights is None else class_weights)
    return make_loss(train.label_smoothing, weights, axis_name, train.loss, train.focal_gamma)


def make_loss(
    smoothing: float = 0.0,
    class_weights: Sequence[float] = (),
    axis_name: str | None = None,
    name: str = "cross_entropy",
    gamma: float = 2.0,
) -> Loss:
    """The loss that training minimises the mean of.

    Args:
      smoothing: share of each label that is spread over all classes; none for focal.
      class_weights: a factor for each class; (): none.
      axis_name: of the devices that the batch is split over.
      name: 'cross_entropy', for one label an image; 'bce' or 'focal', for one or several.
      gamma: of focal.
    """
    if name == "bce":
        return lambda logits, labels: binary_cross_entropy(logits, labels, smoothing, class_weights)
    if name == "focal":
        return lambda logits, labels: focal(logits, labels, gamma, class_weights)

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


def binary_cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, class_weights: Sequence[float] = ()
) -> jax.Array:
    """Of each example the mean over the classes, [N]: their mean is that of torch.nn.BCEWithLogitsLoss(weight).

    A class's weight multiplies its term, whether the image has the label or not; it is not torch's pos_weight. One
    label an image is smoothed as timm's BinaryCrossEntropy does it, to smoothing / K and 1 - smoothing + smoothing / K;
    several are decisions between two each, smoothed to smoothing / 2 and 1 - smoothing / 2 (arXiv:1512.00567, K = 2).
    """
    classes = logits.shape[-1]
    if labels.ndim == 1:
        targets = jax.nn.one_hot(labels, classes, dtype=logits.dtype)
        others = classes
    else:
        targets, others = labels.astype(logits.dtype), 2
    targets = targets * (1 - smoothing) + smoothing / others
    terms = -(targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits))
    return weighted(terms, class_weights).mean(1)


def focal(logits: jax.Array, labels: jax.Array, gamma: float = 2.0, class_weights: Sequence[float] = ()) -> jax.Array:
    """The focal loss of each example, [N] (Lin et al. 2017, arXiv:1708.02002); class weights are its alpha.

    Of one label -weight * (1 - p)**gamma * log p, p the softmax probability of the label; the plain mean of these is
    what is minimised, whatever the weights sum to. Of several labels the mean over the classes of
    torchvision.ops.sigmoid_focal_loss(alpha=-1, gamma), a class's weight on its term, whether the image has the label
    or not.
    """
    if labels.ndim == 1:
        log_p = jax.nn.log_softmax(logits)
        is_own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        own = jnp.where(is_own, log_p, 0).sum(1)
        # log(1 - p) by the others' logits, not by p: where p is nearly 1 nothing cancels, and below gamma 1 gradients
        # stay finite.
        log_rest = jax.nn.logsumexp(log_p, axis=1, where=~is_own)
        losses = -jnp.exp(gamma * log_rest) * own
        return losses * jnp.asarray(class_weights, logits.dtype)[labels] if class_weights else losses
    towards = jnp.where(labels > 0, logits, -logits)
    terms = -jnp.exp(gamma * jax.nn.log_sigmoid(-towards)) * jax.nn.log_sigmoid(towards)
    return weighted(terms, class_weights).mean(1)


def weighted(terms: jax.Array, class_weights: Sequence[float]) -> jax.Array:
    """`terms` [N, K], each times the weight of its class."""
    return terms * jnp.asarray(class_weights, terms.dtype) if class_weights else terms


def numeric_weights(config: ConfigDict, labels: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """train.class_weights as numbers: 'balanced' by the labels that are trained on, [N] or [N, K].

    A pure function of the data: the same in all processes, and after a resume.
    """
    weights = tuple(config.train.class_weights)
    return balanced_weights(labels, num_classes) if weights == ("balanced",) else weights


def balanced_weights(labels: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """A weight for each class, inversely proportional to how often it comes, in the mean over the labels 1.

    That is scikit-learn's compute_class_weight('balanced'), n / (K * n_c), n being all labels, n_c those of the class
    and K the classes that have any. A class without images, which scikit-learn refuses, never is a label: its weight
    is 1. Of several labels an image each one counts.

    Args:
      labels: int [N], or 0 and 1 [N, K].
      num_classes: of the head.
    """
    counts = labels.sum(0, dtype=np.int64) if labels.ndim == 2 else np.bincount(labels, minlength=num_classes)
    weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return tuple(np.where(counts > 0, weights, 1.0).tolist())
