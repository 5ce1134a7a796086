"""Precision, recall and F1 of each class, their averages, and which classes are confused: from labels and predictions.

Memory grows with the examples and with the classes, never with the classes squared.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

AVERAGES = ("macro", "weighted", "micro")
RATIOS = ("precision", "recall", "f1")


class Row(NamedTuple):
    """A class in the table."""

    label: int  # the class's number
    precision: float  # NaN where it is never predicted
    recall: float  # NaN where no example is of it
    f1: float  # NaN where both is so
    support: int  # examples of it


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part` / `whole`, float64; NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class PerClass:
    """How often each class is right, is an example's, and is predicted: int64 [K] each; of resamples float64."""

    hits: np.ndarray  # predictions of the class that are right
    support: np.ndarray  # examples of it
    predicted: np.ndarray  # predictions of it, right or wrong

    @classmethod
    def of(cls, label: np.ndarray, predicted: np.ndarray, num_classes: int) -> PerClass:
        """From one label and one prediction an example, int [N] in 0 .. K-1; a negative prediction is none."""
        counts = functools.partial(np.bincount, minlength=num_classes)
        return cls(counts(label[label == predicted]), counts(label), counts(predicted[predicted >= 0]))

    @functools.cached_property
    def precision(self) -> np.ndarray:
        """Share of a class's predictions that are right: float64 [K], NaN where it is never predicted."""
        return ratio(self.hits, self.predicted)

    @functools.cached_property
    def recall(self) -> np.ndarray:
        """Share of a class's examples that are predicted so: float64 [K], NaN where it has none."""
        return ratio(self.hits, self.support)

    @functools.cached_property
    def f1(self) -> np.ndarray:
        """The harmonic mean of both: float64 [K], NaN where a class has neither an example nor a prediction."""
        return ratio(2 * self.hits, self.support + self.predicted)

    def rows(self) -> list[Row]:
        """One for each class, in their order."""
        columns = (self.precision, self.recall, self.f1, self.support)
        return [Row(*row) for row in zip(range(len(self.support)), *(column.tolist() for column in columns))]

    def average(self, how: str) -> dict[str, float]:
        """Precision, recall and F1 over all classes that an example has or is predicted: "precision", "recall", "f1".

        What scikit-learn's classification_report says under the same names: a ratio with nothing to divide by counts as
        0.

        Args:
          how: 'macro', the mean over classes | 'weighted', by how many examples they have | 'micro', of all decisions
            together, which of one label an example is the accuracy three times.
        """
        if how == "micro":
            whole = PerClass(*(np.array([counts.sum()]) for counts in (self.hits, self.support, self.predicted)))
            return {name: float(np.nan_to_num(getattr(whole, name)[0])) for name in RATIOS}
        occurs = self.support + self.predicted > 0
        weights = self.support[occurs] if how == "weighted" else np.ones(int(occurs.sum()))
        values = {name: np.nan_to_num(getattr(self, name)[occurs]) for name in RATIOS}
        return {name: float(ratio((value * weights).sum(), weights.sum())) for name, value in values.items()}


def confused_pairs(label: np.ndarray, predicted: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """Which classes are taken for which others, the most frequent first: [(label, predicted, count), ...].

    Pairs are directed: cats taken for dogs are one, dogs taken for cats another. Of equally frequent ones the smaller
    label comes first, then the smaller prediction.

    Args:
      label: int [N], 0 or more.
      predicted: int [N]; a negative one is no prediction.
      most: how many pairs at most.
    """
    wrong = (label != predicted) & (predicted >= 0)
    label, predicted = label[wrong].astype(np.int64), predicted[wrong].astype(np.int64)
    base = int(max(label.max(initial=0), predicted.max(initial=0))) + 1
    codes, counts = np.unique(label * base + predicted, return_counts=True)
    first = np.argsort(-counts, kind="stable")[:most]
    return [(int(code) // base, int(code) % base, int(number)) for code, number in zip(codes[first], counts[first])]
