"""The evaluation of images with several labels each: average precision, F1, and how many are right in all labels."""

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
from jaxsft.interpret.metrics import Evaluation, gathered, largest
from jaxsft.interpret.per_class import PerClass

METRICS = ("map", "f1_micro", "f1_macro")  # that an evaluation of one label an image has not


def count(logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the examples where `mask` holds, of one device.

    Args:
      logits: [N, K]; a label is predicted where its logit is above 0, its probability above 0.5.
      labels: [N, K], 1 where an example has the label, else 0.
      losses: [N].
      mask: bool [N].

    Returns:
      "loss" float, "top1" and "count" int32 scalars: "top1" counts the examples all of whose labels are right. One
      with a NaN is wrong.
    """
    right = ((logits > 0) == (labels > 0)).all(1) & ~jnp.isnan(logits).any(1)
    return {
        "loss": jnp.where(mask, losses, 0).sum(),
        "top1": (mask & right).sum(dtype=jnp.int32),
        "count": mask.sum(dtype=jnp.int32),
    }


def probabilities_of(logits: jax.Array) -> jax.Array:
    """The sigmoid of each: the same bits in every program, as `metrics.probabilities_of`."""
    return lax.optimization_barrier(jax.nn.sigmoid(lax.optimization_barrier(logits)))


def answer(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """What a model takes each example for.

    Args:
      logits: [N, K], divided by the temperature.
      labels: [N, K], 1 where an example has the label, else 0.

    Returns:
      "predicted" uint8 [N, K], 1 where the probability is above 0.5; "probability" float [N], that of the decision
      about the label which is furthest from what it is; "probabilities" float [N, K] of the labels; "nll" float [N],
      minus the logarithm of the probability of what is so, its mean over the labels.
    """
    truth = jnp.where(labels > 0, logits, -logits)
    return {
        "predicted": (logits > 0).astype(jnp.uint8),
        "probability": jax.nn.sigmoid(-truth).max(1),
        "probabilities": probabilities_of(logits),
        "nll": -jax.nn.log_sigmoid(truth).mean(1),
    }


def averaged(logits: jax.Array) -> jax.Array:
    """The logit of each label's mean probability over several views of each example: [V, N, K] to [N, K]."""
    return logsumexp(jax.nn.log_sigmoid(logits), axis=0) - logsumexp(jax.nn.log_sigmoid(-logits), axis=0)


def average_precision(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """The mean of the precision at each positive's rank: scikit-learn's average_precision_score; NaN without positives.

    Examples of one score are taken together: their order can't matter.

    Args:
      scores: [N], none of them NaN.
      is_positive: bool [N].
    """
    positives = int(is_positive.sum())
    if not positives:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked, found = scores[order], np.cumsum(is_positive[order])
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # of each group of equals
    precision = found[last] / (last + 1)
    return float((np.diff(found[last], prepend=0) * precision).sum() / positives)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class MultiLabelEvaluation:
    """The result over a whole split whose examples have any number of labels each."""

    num_classes: int
    answers: Mapping[str, np.ndarray]  # "example" int32 [N]; "label" uint8, "logits" float [N, K]; what `answer` says
    precision: np.ndarray  # float64 [K], average precision; NaN without positives
    f1: np.ndarray  # float64 [K], at a probability of 0.5; NaN where no example has the label and none is predicted it
    f1_micro: float  # of all decisions together
    class_names: tuple[str, ...] = ()  # for people; (): their numbers

    @classmethod
    def of(
        cls, batches: Iterable[Mapping[str, Any]], num_classes: int, class_names: tuple[str, ...] = ()
    ) -> MultiLabelEvaluation:
        """From what `make_eval_step` returns of every batch, on the host: the scores of all examples."""
        answers = gathered(batches)
        has, scores = answers["label"] > 0, answers["logits"]
        scores = np.where(np.isnan(scores).any(1, keepdims=True), -np.inf, scores)  # what can't be ranked comes last
        predicted = scores > 0
        hits, all_of = (has & predicted).sum(0), has.sum(0) + predicted.sum(0)
        with np.errstate(invalid="ignore"):
            f1, f1_micro = 2 * hits / all_of, float(np.divide(2 * hits.sum(), all_of.sum()))
        precision = np.array([average_precision(scores[:, k], has[:, k]) for k in range(num_classes)])
        return cls(num_classes, answers, precision, f1, f1_micro, class_names)

    @property
    def count(self) -> int:
        """How many examples were evaluated."""
        return len(self.answers["label"])

    @functools.cached_property
    def loss(self) -> float:
        """Binary cross-entropy, mean over examples and classes."""
        return float(np.mean(self.answers["loss"], dtype=np.float64))

    @functools.cached_property
    def accuracy(self) -> float:
        """Share of the examples all of whose labels are right, scikit-learn's accuracy_score; a NaN is wrong."""
        right = (self.answers["predicted"] == self.answers["label"]).all(1)
        return float((right & ~np.isnan(self.answers["logits"]).any(1)).mean())

    @functools.cached_property
    def positives(self) -> np.ndarray:
        """How many examples have each label: int64 [K]."""
        return (self.answers["label"] > 0).sum(0)

    @functools.cached_property
    def classes(self) -> PerClass:
        """Precision, recall and F1 of each class at a probability of 0.5, and how many examples have it."""
        has, predicted = self.answers["label"] > 0, self.answers["logits"] > 0
        return PerClass((has & predicted).sum(0), has.sum(0), predicted.sum(0))

    def per_class_table(self) -> list[per_class.Row]:
        """A row for each class, in their order: its number, precision, recall, F1 and support."""
        return self.classes.rows()

    def average(self, how: str = "macro") -> dict[str, float]:
        """The mean "precision", "recall" and "f1", 'macro', 'weighted' or 'micro'; see `PerClass.average`."""
        return self.classes.average(how)

    def calibration(self, bins: int = BINS, adaptive: bool = False) -> Calibration:
        """The reliability curve of all labels of all examples: how often one of such a probability is there.

        That is scikit-learn's calibration_curve of the labels put in one row: not of the decisions, at 0.5, for a label
        of a probability of 0.1 that is there once in ten times is told rightly.
        """
        probabilities, has = self.answers["probabilities"].ravel(), self.answers["label"].ravel() > 0
        return calibration.calibrate(probabilities, has, bins, adaptive)

    @property
    def nll(self) -> float:
        """The mean negative log-likelihood, over examples and labels: the loss, with the temperature in it."""
        return float(np.mean(self.answers["nll"], dtype=np.float64))

    @property
    def brier(self) -> float:
        """Brier's score of two outcomes, 0 to 1: the mean squared distance of a label's probability from 0 or 1."""
        return float(np.mean((self.answers["probabilities"] - (self.answers["label"] > 0)) ** 2, dtype=np.float64))

    def top_losses(self, most: int = 10) -> np.ndarray:
        """The rows of `answers` with the largest loss, the largest first, of equals the first; NaN is above all."""
        return largest(self.answers["loss"], most)

    def interval(self, number: int = bootstrap.RESAMPLES, seed: int = bootstrap.SEED) -> dict[str, Interval]:
        """The 95 % bootstrap intervals of "accuracy", "loss", "f1_micro", "f1_macro" and "ece".

        They are those of `bootstrap.intervals`; `number` is that of the resamples. The mean average precision has none,
        for each resample would be ranked anew.
        """
        return bootstrap.of_several_labels(self.answers, number, seed)

    def __repr__(self) -> str:
        return f"<{self.summary()}>"

    def _repr_html_(self) -> str:
        """What IPython displays."""
        from jaxsft.interpret import tables  # here: it imports this module

        return tables.as_html(self)

    @property
    def map(self) -> float:
        """Mean average precision over the classes that have positives."""
        return mean(self.precision)

    @property
    def f1_macro(self) -> float:
        """The mean F1 of the classes that have one: f1_score(average="macro", zero_division=nan) of scikit-learn's."""
        return mean(self.f1)

    def summary(self) -> str:
        """One line for people."""
        right = round(self.accuracy * self.count)
        f1 = f"F1 {self.f1_micro:.4f} (micro) {self.f1_macro:.4f} (macro)"
        said = f"mAP {self.map:.4f}, {f1}, all labels right {self.accuracy:.4f} ({right} of {self.count})"
        return f"{said}, loss {self.loss:.4f}"

    def scalars(self) -> dict[str, Any]:
        """Loss, accuracy, the METRICS and count, as metrics.jsonl has them."""
        shares = {name: getattr(self, name) for name in METRICS}
        return {"loss": self.loss, "accuracy": self.accuracy, **shares, "count": self.count}

    def per_class(self) -> np.ndarray:
        """Average precision of each class, float64 [K]; NaN for a class without positives."""
        return self.precision

    def record(self, class_names: tuple[str, ...]) -> dict[str, Any]:
        """As JSON: the scalars, and by name per_class (average precision), f1_per_class and positives."""
        shares = {"per_class": self.precision, "f1_per_class": self.f1}
        by_name = {
            key: {name: None if np.isnan(value) else value for name, value in zip(class_names, values.tolist())}
            for key, values in shares.items()
        }
        return {**self.scalars(), **by_name, "positives": dict(zip(class_names, self.positives.tolist(), strict=True))}


Result = Evaluation | MultiLabelEvaluation


def mean(values: np.ndarray) -> float:
    """The mean of those that are numbers; NaN where none is."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else float("nan")
