"""What an evaluation says, held to scikit-learn; ties and NaNs, which it leaves open, to a rule of ours."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from sklearn import metrics as sklearn

from jaxsft.interpret import metrics
from jaxsft.interpret.metrics import Evaluation
from jaxsft.learn.losses import cross_entropy

ROWS, BATCH = 203, 64  # the last batch holds 11
count = jax.jit(lambda *arrays: metrics.count(arrays[0], arrays[1], cross_entropy(arrays[0], arrays[1]), arrays[2]))


def evaluate(logits: np.ndarray, labels: np.ndarray, mask: np.ndarray | None = None) -> Evaluation:
    """As a run does it: batch by batch, the last one filled with rows that are masked."""
    batches: list[dict[str, Any]] = []
    for start in range(0, len(labels), BATCH):
        rows = np.minimum(np.arange(start, start + BATCH), len(labels) - 1)
        counted = np.arange(start, start + BATCH) < len(labels)
        counted &= True if mask is None else mask[rows]
        batches.append(jax.device_get(count(logits[rows], labels[rows], counted)))
    return Evaluation.of(batches)


def draw(classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits without ties, float32 [ROWS, classes], that know something of the labels, int32 [ROWS].

    The classes are unequally frequent, so that a mean over classes or batches is not the mean over examples.
    """
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.3, ROWS) - 1, classes - 1).astype(np.int32)
    logits = rng.standard_normal((ROWS, classes)).astype(np.float32)
    logits[np.arange(ROWS), labels] += 1
    return logits, labels


@pytest.mark.parametrize("classes", [3, 6, 12])
def test_everything_is_scikit_learns(classes: int) -> None:
    logits, labels = draw(classes)
    found, numbers, predicted = evaluate(logits, labels), np.arange(classes), logits.argmax(1)
    assert found.count == ROWS
    assert found.accuracy == sklearn.accuracy_score(labels, predicted)
    top5 = sklearn.top_k_accuracy_score(labels, logits, k=5, labels=numbers) if classes > 5 else 1.0
    assert found.top5 == top5
    assert classes <= 6 or found.top5 < sklearn.top_k_accuracy_score(labels, logits, k=6, labels=numbers) <= 1
    confusion = sklearn.confusion_matrix(labels, predicted, labels=numbers)
    np.testing.assert_array_equal(found.confusion, confusion)
    recall = sklearn.recall_score(labels, predicted, labels=numbers, average=None, zero_division=np.nan)
    np.testing.assert_array_equal(found.per_class(), recall)
    odds = np.exp(logits.astype(np.float64))
    loss = sklearn.log_loss(labels, odds / odds.sum(1, keepdims=True), labels=numbers)
    assert found.loss == pytest.approx(loss, rel=1e-6)  # float32 logarithms, and sums of up to 64 of them

    record = found.record(tuple(map(str, numbers)))
    assert {key: record[key] for key in found.scalars()} == found.scalars()
    assert record["confusion"] == confusion.tolist()
    expected = {str(n): None if np.isnan(value) else value for n, value in enumerate(recall)}
    assert record["per_class"] == expected
    right = (labels == predicted).sum()
    of_few = {3: "", 6: f", top-5 {top5:.4f} of 6 classes"}  # of five and fewer all are among the first five
    said = of_few.get(classes, f", top-5 {top5:.4f}")
    assert found.summary() == f"accuracy {right / ROWS:.4f} ({right} of {ROWS}){said}, loss {found.loss:.4f}"


def test_a_class_without_examples_has_no_accuracy() -> None:
    logits, labels = draw(6)  # the fewest of which five can miss one
    keep = labels != 2
    found = evaluate(logits[keep], labels[keep])
    assert np.isnan(found.per_class()[2])
    assert found.record(tuple("abcdef"))["per_class"]["c"] is None
    assert found.record(tuple("abcdef"))["per_class"]["b"] == found.per_class()[1]


def test_of_equal_logits_the_smaller_class_comes_first() -> None:
    """A stable order of the logits, largest first: nobody gains by writing the same number everywhere."""
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 3, (ROWS, 12)).astype(np.float32)
    logits[:40] = 0  # nothing but ties
    logits[40:80, :6] = np.inf
    logits[80:90, 3] = -np.inf
    labels = rng.integers(0, 12, ROWS).astype(np.int32)
    order = np.argsort(-logits, axis=1, kind="stable")
    found = evaluate(logits, labels)
    assert found.accuracy == (order[:, 0] == labels).mean()
    assert found.top5 == (order[:, :5] == labels[:, None]).any(1).mean()
    np.testing.assert_array_equal(found.confusion, sklearn.confusion_matrix(labels, order[:, 0], labels=np.arange(12)))
    assert evaluate(np.zeros((60, 12), np.float32), np.arange(60, dtype=np.int32) % 12).accuracy == 1 / 12


@pytest.mark.parametrize("where", ["own", "other", "all"])
def test_a_row_with_a_nan_is_wrong_and_counts(where: str) -> None:
    logits, labels = draw(12)
    broken = np.arange(ROWS) % 4 == 1
    if where == "all":
        logits[broken] = np.nan
    else:
        logits[broken, (labels[broken] + (where == "other")) % 12] = np.nan
    found, whole, share = evaluate(logits, labels), ~broken, np.mean(~broken)
    predicted = logits[whole].argmax(1)
    top5 = sklearn.top_k_accuracy_score(labels[whole], logits[whole], k=5, labels=np.arange(12))
    assert found.count == ROWS
    assert found.accuracy == pytest.approx(share * sklearn.accuracy_score(labels[whole], predicted), rel=1e-12)
    assert found.top5 == pytest.approx(share * top5, rel=1e-12)
    np.testing.assert_array_equal(
        found.confusion, sklearn.confusion_matrix(labels[whole], predicted, labels=np.arange(12))
    )
    assert np.isnan(found.loss)


def test_masked_rows_are_nowhere() -> None:
    """Not in the loss either, whatever they hold."""
    logits, labels = draw(12)
    mask = np.random.default_rng(1).random(ROWS) < 0.6
    hidden, wrong = logits.copy(), labels.copy()
    hidden[~mask] = np.resize([np.nan, np.inf, 1e30], (int((~mask).sum()), 12))
    wrong[~mask] = 11
    found = evaluate(hidden, wrong, mask)
    expected = evaluate(logits[mask], labels[mask])
    assert found.count == mask.sum() == sklearn.confusion_matrix(labels[mask], labels[mask]).sum()
    assert (found.accuracy, found.top5) == (expected.accuracy, expected.top5)
    assert found.accuracy == sklearn.accuracy_score(labels[mask], logits[mask].argmax(1))
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    np.testing.assert_array_equal(found.confusion, expected.confusion)


def test_counts_stay_whole_where_float32_would_not() -> None:
    """16 million rows and more: batches are summed on the host in float64."""
    many = 2**24 + 1
    full = {"loss": np.float32(1), "top1": np.int32(many), "top5": np.int32(many), "count": np.int32(many)}
    batch = {**count(np.zeros((BATCH, 12), np.float32), np.zeros(BATCH, np.int32), np.ones(BATCH, bool)), **full}
    found = Evaluation.of([batch, batch])
    assert found.count == 2 * many
    assert found.accuracy == 1.0
