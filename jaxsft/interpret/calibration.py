"""Whether a probability of 0.9 is right nine times in ten: the reliability curve, its errors, and the temperature."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxsft.cli import UserError

BINS = 15  # of Guo et al. 2017 (arXiv:1706.04599)
LEAST, MOST = 0.01, 100.0  # temperatures; beyond them the split has nothing to say of it
ITERATIONS = 100  # of Newton's method, which takes about six; halving alone would take 50
ROWS = 4096  # at a time, in float64


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


def at_temperature(
    logits: np.ndarray, labels: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `calibrate` takes, and the negative log-likelihoods, at a temperature, in float64.

    Args:
      logits: float [N, K].
      labels: int [N], or of several an image 0 and 1 [N, K].

    Returns:
      The probability of what is predicted, whether that is right, and minus the logarithm of the label's probability:
      [N] each; of several labels an image those of each label, and whether it is there, [N K].
    """
    z = logits.astype(np.float64) / temperature
    if labels.ndim == 2:
        has = labels.ravel() > 0
        nll = np.logaddexp(0, np.where(has, -z.ravel(), z.ravel()))
        return np.exp(-np.logaddexp(0, -z.ravel())), has, nll
    logarithms = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    right = (z.argmax(1) == labels) & ~np.isnan(z).any(1)
    return np.exp(logarithms.max(1)), right, -logarithms[np.arange(len(z)), labels]


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of the least mean negative log-likelihood of the labels (Guo et al. 2017).

    The likelihood of softmax(logits / T), of several labels an image of sigmoid(logits / T), is convex in 1 / T, and
    Newton's method on its slope, in float64 and kept within a bracket, finds the one minimum. No prediction changes.

    Args:
      logits: float [N, K].
      labels: int [N], or of several an image 0 and 1 [N, K].

    Raises:
      UserError: the logits are no numbers, or none from LEAST to MOST is best: there is no mistake, or nothing else.
    """
    what_to_do = "fit it on a split that is larger or harder"
    if not np.isfinite(logits).all():
        raise UserError("no temperature fits: the network computes no numbers", "take another --checkpoint")
    low, high = 1 / MOST, 1 / LEAST
    if slopes(logits, labels, low)[0] >= 0:
        raise UserError("no temperature fits: the network knows nothing of these labels", "name another split")
    if slopes(logits, labels, high)[0] <= 0:
        said = f"no temperature fits: the network is right of all {len(labels)} images, and could be surer without end"
        raise UserError(said, what_to_do)
    inverse = 1.0
    for _ in range(ITERATIONS):
        slope, curvature = slopes(logits, labels, inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        following = inverse - slope / curvature if curvature > 0 else 0.0
        if not low < following < high:
            following = (low * high) ** 0.5
        if abs(following - inverse) <= 1e-10 * inverse:
            break
        inverse = following
    return 1 / inverse


def slopes(logits: np.ndarray, labels: np.ndarray, inverse: float) -> tuple[float, float]:
    """The first and second derivative of the mean negative log-likelihood by the inverse temperature, in float64.

    Args:
      logits, labels: as for `fit_temperature`.
      inverse: 1 / temperature.
    """
    slope = curvature = 0.0
    for start in range(0, len(logits), ROWS):
        z, label = logits[start : start + ROWS].astype(np.float64), labels[start : start + ROWS]
        if label.ndim == 2:
            p = 1 / (1 + np.exp(-np.clip(inverse * z, -700, 700)))
            slope += float((z * (p - label)).sum())
            curvature += float((z**2 * p * (1 - p)).sum())
            continue
        z -= z.max(1, keepdims=True)
        p = np.exp(inverse * z)
        p /= p.sum(1, keepdims=True)
        mean = (p * z).sum(1)
        slope += float((mean - z[np.arange(len(z)), label]).sum())
        curvature += float(((p * z**2).sum(1) - mean**2).sum())
    count = labels.size
    return slope / count, curvature / count
