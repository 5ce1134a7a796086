"""Whether a probability of 0.9 is right nine times in ten: the reliability curve, and the errors that sum it up."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

BINS = 15  # of Guo et al. 2017 (arXiv:1706.04599)


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """The reliability curve: examples by the probability of what they are taken for, in bins of it."""

    ece: float  # expected calibration error: the mean distance of accuracy and confidence, weighed by the counts
    mce: float  # the largest distance of a bin
    edges: np.ndarray  # float64 [bins + 1], of probability; a bin holds what is above its lower edge, up to the upper
    counts: np.ndarray  # int64 [bins], examples
    accuracy: np.ndarray  # float64 [bins], the share of them that is right; NaN in an empty bin
    confidence: np.ndarray  # float64 [bins], their mean probability; NaN in an empty bin

    def record(self) -> dict[str, Any]:
        """As JSON, under the names of the fields."""
        fields = dataclasses.asdict(self)
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


def bins_of(confidence: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin that each probability lies in, int64 [N]: above its lower edge, up to the upper, the first from 0."""
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, len(edges) - 2)


def edges_of(confidence: np.ndarray, bins: int, adaptive: bool) -> np.ndarray:
    """Of bins of one width over 0 .. 1, or where `adaptive` of bins with as many examples each: float64 [bins + 1]."""
    if adaptive and len(confidence):
        return np.quantile(confidence, np.linspace(0, 1, bins + 1))
    return np.linspace(0, 1, bins + 1)


def calibrate(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS, adaptive: bool = False) -> Calibration:
    """The reliability curve and its errors, as Guo et al. 2017 define them: bins ((m-1)/M, m/M] of one width.

    A NaN is no probability: such examples are in no bin, and do not count in the errors.

    Args:
      confidence: float [N] in 0 .. 1, of what each example is taken for.
      correct: bool [N], whether it is that.
      bins: how many.
      adaptive: let bins hold as many examples each (Nixon et al. 2019, arXiv:1904.01685) in place of one width.
    """
    known = ~np.isnan(confidence)
    confidence, correct = confidence[known].astype(np.float64), np.asarray(correct)[known]
    edges = edges_of(confidence, bins, adaptive)
    which = bins_of(confidence, edges)
    counts = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(which, correct, bins) / counts
        mean = np.bincount(which, confidence, bins) / counts
    if not len(confidence):
        return Calibration(np.nan, np.nan, edges, counts, accuracy, mean)
    distance = np.nan_to_num(np.abs(accuracy - mean))
    ece = float((counts * distance).sum() / counts.sum())
    return Calibration(ece, float(distance.max()), edges, counts, accuracy, mean)
