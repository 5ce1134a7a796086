"""Exact results of an evaluation, and what is said of them.

The device says of each example what the model takes it for; sums and ratios are taken once, on the host. A mean of
batch means would weigh a partial batch wrongly, and a confusion matrix a batch would take memory with the classes
squared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp

from jaxsft.interpret import bootstrap, calibration, per_class
from jaxsft.interpret.bootstrap import Interval
from jaxsft.interpret.calibration import BINS, Calibration
from jaxsft.interpret.per_class import PerClass

UNRANKED = -1  # the prediction of a row with a NaN
MOST_IN_RECORD = 1000  # classes whose confusion matrix is written in full: a million numbers


def rank_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How many classes are ranked before an example's label: int32 [N], 0 where the label is predicted.

    A class is before the label's when its logit is larger, or equal at a smaller index: ties are broken in one way
    only. A row with a NaN ranks nothing, and a label outside the head has no rank: K, more than any other.

    Args:
      logits: [N, K].
      labels: int32 [N].
    """
    classes = logits.shape[-1]
    own = jnp.take_along_axis(logits, labels[:, None], axis=1, mode="clip")
    earlier = jnp.arange(classes) < labels[:, None]
    before = ((logits > own) | ((logits == own) & earlier)).sum(1, dtype=jnp.int32)
    is_ranked = ~jnp.isnan(logits).any(1) & (labels >= 0) & (labels < classes)
    return jnp.where(is_ranked, before, classes)


def count(logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the examples where `mask` holds, of one device: "loss" float, "top1" and "count" int32 scalars.

    Args:
      logits: [N, K].
      labels: int32 [N].
      losses: [N].
      mask: bool [N].
    """
    return {
        "loss": jnp.where(mask, losses, 0).sum(),
        "top1": (mask & (rank_of(logits, labels) == 0)).sum(dtype=jnp.int32),
        "count": mask.sum(dtype=jnp.int32),
    }


def probabilities_of(logits: jax.Array) -> jax.Array:
    """The softmax of each row: the same bits in every program, for XLA fuses it with nothing before or after it."""
    return lax.optimization_barrier(jax.nn.softmax(lax.optimization_barrier(logits)))


def answer(logits: jax.Array, labels: jax.Array, top: int = 0) -> dict[str, jax.Array]:
    """What a model takes each example for.

    Args:
      logits: [N, K], divided by the temperature.
      labels: int32 [N].
      top: how many classes to name.

    Returns:
      "predicted" int32 [N], of equal logits the first, UNRANKED in a row with a NaN; its "probability", float [N]; the
      "rank" of the label, as `rank_of` has it; "nll", minus the logarithm of the label's probability, and "brier", the
      squared distance of all probabilities from 1 for the label and else 0 (0 to 2), float [N]; with `top` the most
      probable "classes", int32 [N, top], and their "probabilities".
    """
    logarithms = jax.nn.log_softmax(logits)
    probabilities = probabilities_of(logits)
    is_label = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    answers = {
        "predicted": jnp.where(jnp.isnan(logits).any(1), UNRANKED, logits.argmax(1)).astype(jnp.int32),
        "probability": probabilities.max(1),
        "rank": rank_of(logits, labels),
        "nll": -jnp.take_along_axis(logarithms, labels[:, None], axis=1, mode="clip")[:, 0],
        "brier": ((probabilities - is_label) ** 2).sum(1),
    }
    if top:
        answers["probabilities"], answers["classes"] = lax.top_k(probabilities, top)
    return answers


def averaged(logits: jax.Array) -> jax.Array:
    """The logarithm of the mean probability over several views of each example: [V, N, K] to [N, K].

    Probabilities are averaged, as fastai does, not logits, as timm did: so each view has one vote, however large its
    logits are, and what comes out is a probability of a mixture, whose loss is at most the views' mean loss.
    """
    return logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(len(logits))


def largest(losses: np.ndarray, most: int) -> np.ndarray:
    """The places of the largest of `losses`, float [N], the largest first, of equals the first; NaN is above all."""
    return np.argsort(-np.where(np.isnan(losses), np.inf, losses), kind="stable")[:most]


def gathered(batches: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The answers about every batch, "mask" bool [B] among them, as one array each without what is masked."""
    kept: list[dict[str, np.ndarray]] = []
    for batch in batches:
        mask = np.asarray(batch["mask"])
        kept.append({name: np.asarray(value)[mask] for name, value in batch.items() if name != "mask"})
    return {name: np.concatenate([batch[name] for batch in kept]) for name in kept[0]}


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Evaluation:
    """The result over a whole split.

    Memory grows with the examples and with the classes, with the classes squared only where `confusion` is asked for.
    """

    num_classes: int
    answers: Mapping[str, np.ndarray]  # "example", "label" int32 [N], "loss" float [N], and what `answer` says
    class_names: tuple[str, ...] = ()  # for people; (): their numbers

    @classmethod
    def of(
        cls, batches: Iterable[Mapping[str, Any]], num_classes: int, class_names: tuple[str, ...] = ()
    ) -> Evaluation:
        """From what `make_eval_step` returns of every batch, on the host."""
        return cls(num_classes, gathered(batches), class_names)

    @property
    def count(self) -> int:
        """How many examples were evaluated."""
        return len(self.answers["label"])

    @functools.cached_property
    def loss(self) -> float:
        """Mean over the examples, summed in float64."""
        return float(np.mean(self.answers["loss"], dtype=np.float64))

    @functools.cached_property
    def accuracy(self) -> float:
        """Share of the examples whose label is predicted."""
        return self.within(1)

    @functools.cached_property
    def top5(self) -> float:
        """Share of the examples whose label is among the five most probable classes."""
        return self.within(5)

    def within(self, most: int) -> float:
        """Share of the examples whose label is among the `most` most probable classes."""
        rank = self.answers["rank"]
        return float(((rank < most) & (rank < self.num_classes)).mean())

    @functools.cached_property
    def classes(self) -> PerClass:
        """Precision, recall, F1 and support of each class."""
        return PerClass.of(self.answers["label"], self.answers["predicted"], self.num_classes)

    def per_class_table(self) -> list[per_class.Row]:
        """A row for each class, in their order: its number, precision, recall, F1 and support."""
        return self.classes.rows()

    def confused(self, most: int = 10) -> list[tuple[int, int, int]]:
        """Which classes are taken for which others, the most frequent first: [(label, predicted, count), ...]."""
        return per_class.confused_pairs(self.answers["label"], self.answers["predicted"], most)

    def average(self, how: str = "macro") -> dict[str, float]:
        """The mean "precision", "recall" and "f1" of the classes, 'macro' or 'weighted'; see `PerClass.average`."""
        return self.classes.average(how)

    def calibration(self, bins: int = BINS, adaptive: bool = False) -> Calibration:
        """The reliability curve of what is predicted, and its errors; see `calibration.calibrate`."""
        return calibration.calibrate(self.answers["probability"], self.answers["rank"] == 0, bins, adaptive)

    @property
    def nll(self) -> float:
        """The mean negative log-likelihood: the loss, with the temperature in it."""
        return float(np.mean(self.answers["nll"], dtype=np.float64))

    @property
    def brier(self) -> float:
        """Brier's score in his own definition, 0 to 2: the mean squared distance over all classes, summed over them."""
        return float(np.mean(self.answers["brier"], dtype=np.float64))

    def top_losses(self, most: int = 10) -> np.ndarray:
        """The rows of `answers` with the largest loss, the largest first, of equals the first; NaN is above all."""
        return largest(self.answers["loss"], most)

    def interval(self, number: int = bootstrap.RESAMPLES, seed: int = bootstrap.SEED) -> dict[str, Interval]:
        """The 95 % bootstrap intervals of "accuracy", "top5", "loss", "f1_macro" and "ece", from `number` resamples.

        See `bootstrap.intervals`. That of the calibration error lies high, since a resample is noisier than what it is
        drawn from, and noise counts as miscalibration.
        """
        return bootstrap.of_one_label(self.answers, self.num_classes, number, seed)

    @functools.cached_property
    def confusion(self) -> np.ndarray:
        """Examples by label (row) and prediction (column), int64 [K, K]; those without a prediction are not in it."""
        label, predicted = self.answers["label"].astype(np.int64), self.answers["predicted"]
        codes = (label * self.num_classes + predicted)[predicted != UNRANKED]
        return np.bincount(codes, minlength=self.num_classes**2).reshape(self.num_classes, self.num_classes)

    def __repr__(self) -> str:
        return f"<{self.summary()}>"

    def _repr_html_(self) -> str:
        """What IPython displays."""
        from jaxsft.interpret import tables  # here: it imports this module

        return tables.as_html(self)

    def summary(self) -> str:
        """One line for people."""
        right, classes = round(self.accuracy * self.count), self.num_classes
        top5 = f", top-5 {self.top5:.4f}" + (f" of {classes} classes" if classes < 10 else "") if classes > 5 else ""
        return f"accuracy {self.accuracy:.4f} ({right} of {self.count}){top5}, loss {self.loss:.4f}"

    def scalars(self) -> dict[str, Any]:
        """Loss, accuracy, top-5 and count, as metrics.jsonl has them."""
        return {"loss": self.loss, "accuracy": self.accuracy, "top5": self.top5, "count": self.count}

    def per_class(self) -> np.ndarray:
        """Accuracy of each class, float64 [K]; NaN for a class without examples."""
        return self.classes.recall

    def record(self, class_names: tuple[str, ...]) -> dict[str, Any]:
        """As JSON: loss, accuracy, top5, count, per_class by name, confusion where there are few classes."""
        classes = zip(class_names, self.per_class().tolist(), strict=True)
        few = self.num_classes <= MOST_IN_RECORD
        return {
            **self.scalars(),
            "per_class": {name: None if np.isnan(value) else value for name, value in classes},
            **({"confusion": self.confusion.tolist()} if few else {}),
        }
