"""How far a result would move with other examples: percentile intervals over resamples of those that there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import NormalDist

import numpy as np

from jaxsft.interpret.calibration import BINS, bins_of, edges_of
from jaxsft.interpret.per_class import PerClass

RESAMPLES, LEVEL, SEED = 1000, 0.95, 0
MOST_NUMBERS = 1 << 22  # held at a time: 32 MB
Interval = tuple[float, float]
Statistic = Callable[[np.ndarray], np.ndarray]  # how often each example is drawn, float64 [R, N] -> float64 [R]


def resamples(examples: int, number: int, seed: int = SEED) -> Iterator[np.ndarray]:
    """How often each example is in each of `number` resamples of as many, drawn with replacement: float64 [R, N].

    A few resamples at a time, so that memory does not grow with their number. They are a function of the arguments.
    """
    rng = np.random.default_rng(seed)
    at_once = max(MOST_NUMBERS // examples, 1)
    for start in range(0, number, at_once):
        rows = min(at_once, number - start)
        drawn = rng.integers(0, examples, (rows, examples)) + examples * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * examples).reshape(rows, examples).astype(np.float64)


def intervals(
    statistics: Mapping[str, Statistic], examples: int, number: int = RESAMPLES, level: float = LEVEL, seed: int = SEED
) -> dict[str, Interval]:
    """The percentile interval of each statistic (Efron): what lies between its quantiles over the resamples.

    All statistics see the same resamples. A statistic that is no number in one of them has (NaN, NaN).

    Args:
      statistics: by name.
      examples: how many there are.
      number: of resamples.
      level: the share of resamples that lies inside.
      seed: of what is drawn.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for drawn in resamples(examples, number, seed):
        for name, statistic in statistics.items():
            found[name].append(statistic(drawn))
    edges = (1 - level) / 2, (1 + level) / 2
    quantiles = {name: np.quantile(np.concatenate(values), edges) for name, values in found.items()}
    return {name: (float(low), float(high)) for name, (low, high) in quantiles.items()}


def mean_of(values: np.ndarray) -> Statistic:
    """The mean over the examples: values [N]."""
    own = values.astype(np.float64)
    return lambda drawn: drawn @ own / drawn.sum(1)


def calibration_error_of(probability: np.ndarray, is_so: np.ndarray, bins: int = BINS) -> Statistic:
    """The expected calibration error: its bins stay where they are.

    Args:
      probability: float [N], or [N, K] for as many decisions about each example; a NaN counts nowhere.
      is_so: bool, of the same shape, whether it came true.
      bins: how many.
    """
    which = bins_of(np.nan_to_num(probability), edges_of(probability, bins, False))
    known = ~np.isnan(probability)
    row, gap = np.nonzero(known)[0], (is_so - np.nan_to_num(probability).astype(np.float64))[known]
    each = np.bincount(row * bins + which[known], gap, len(probability) * bins).reshape(-1, bins)
    decisions = known.reshape(len(known), -1).sum(1).astype(np.float64)
    return lambda drawn: np.abs(drawn @ each).sum(1) / (drawn @ decisions)


def wilson(right: int, count: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share, `right` of `count`.

    In place of the resamples' where none or all are right: every resample then says what the examples do, however few
    they are, and an interval without width would be a promise that nobody can keep.
    """
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    share, middle = right / count, right / count + z2 / (2 * count)
    half = (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5
    low, high = ((middle - half) / (1 + z2 / count), (middle + half) / (1 + z2 / count))
    return max(low, 0.0), min(high, 1.0)


def of_one_label(answers: Mapping[str, np.ndarray], num_classes: int, number: int, seed: int) -> dict[str, Interval]:
    """Of "accuracy", "top5", "loss", "f1_macro" and "ece", from an `Evaluation`'s answers."""
    rank = answers["rank"]
    right, within = rank == 0, (rank < 5) & (rank < num_classes)

    def f1_macro(drawn: np.ndarray) -> np.ndarray:
        counts = (PerClass(*(np.bincount(of, row[rows], num_classes) for of, rows in parts)) for row in drawn)
        return np.array([each.average("macro")["f1"] for each in counts])

    label, predicted = answers["label"], answers["predicted"]
    # Hits, support, predictions:
    which = (np.flatnonzero(right), np.arange(len(label)), np.flatnonzero(predicted >= 0))
    parts = [(of[rows], rows) for of, rows in zip((label, label, predicted), which, strict=True)]
    statistics = {
        "loss": mean_of(answers["loss"]),
        "f1_macro": f1_macro,
        "ece": calibration_error_of(answers["probability"], right),
    }
    return with_shares({"accuracy": right, "top5": within}, statistics, number, seed)


def of_several_labels(answers: Mapping[str, np.ndarray], number: int, seed: int) -> dict[str, Interval]:
    """Of "accuracy", "loss", "f1_micro", "f1_macro" and "ece", from a `MultiLabelEvaluation`'s answers."""
    has, predicted = answers["label"] > 0, answers["logits"] > 0
    right = (has == predicted).all(1) & ~np.isnan(answers["logits"]).any(1)
    hits, either = (has & predicted).astype(np.float64), has.astype(np.float64) + predicted

    def f1_macro(drawn: np.ndarray) -> np.ndarray:
        both = drawn @ either
        f1 = np.divide(2 * (drawn @ hits), both, out=np.zeros_like(both), where=both > 0)
        return f1.sum(1) / np.maximum((both > 0).sum(1), 1)

    statistics = {
        "loss": mean_of(answers["loss"]),
        "f1_micro": lambda drawn: 2 * (drawn @ hits.sum(1)) / np.maximum(drawn @ either.sum(1), 1),
        "f1_macro": f1_macro,
        "ece": calibration_error_of(answers["probabilities"], has),
    }
    return with_shares({"accuracy": right}, statistics, number, seed)


def with_shares(
    shares: Mapping[str, np.ndarray], statistics: Mapping[str, Statistic], number: int, seed: int
) -> dict[str, Interval]:
    """The intervals of shares, bool [N], and of other statistics; Wilson's where none or all are right."""
    count = len(next(iter(shares.values())))
    means = {name: mean_of(values) for name, values in shares.items()}
    found = intervals({**means, **statistics}, count, number, seed=seed)
    for name, values in shares.items():
        if values.all() or not values.any():
            found[name] = wilson(int(values.sum()), count)
    return found
