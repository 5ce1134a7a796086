"""What an evaluation says, held to scikit-learn; ties and NaNs, which it leaves open, to a rule of ours."""

from __future__ import annotations

import tracemalloc
from typing import Any

import jax
import numpy as np
import pytest
from sklearn import metrics as sklearn

from jaxsft.interpret import metrics
from jaxsft.interpret.metrics import UNRANKED, Evaluation
from jaxsft.interpret.per_class import PerClass, confused_pairs
from jaxsft.learn.losses import cross_entropy

ROWS, BATCH = 203, 64  # the last batch holds 11
answer = jax.jit(lambda *arrays: {**metrics.answer(*arrays), "loss": cross_entropy(*arrays), "label": arrays[1]})


def evaluate(logits: np.ndarray, labels: np.ndarray, mask: np.ndarray | None = None) -> Evaluation:
    """As a run does it: batch by batch, the last one filled with rows that are masked."""
    batches: list[dict[str, Any]] = []
    for start in range(0, len(labels), BATCH):
        rows = np.minimum(np.arange(start, start + BATCH), len(labels) - 1)
        counted = np.arange(start, start + BATCH) < len(labels)
        counted &= True if mask is None else mask[rows]
        batches.append({**jax.device_get(answer(logits[rows], labels[rows])), "mask": counted})
    return Evaluation.of(batches, logits.shape[1])


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


@pytest.mark.parametrize("classes", [3, 12])
def test_each_class_is_scikit_learns(classes: int) -> None:
    """Class 1 has no examples, 2 no predictions, and the last neither."""
    logits, labels = draw(classes + 1)
    labels[(labels == 1) | (labels == classes)] = 0
    logits[:, 2] = logits[:, classes] = -9
    found, numbers, predicted = evaluate(logits, labels), np.arange(classes + 1), logits.argmax(1)
    *ratios, support = sklearn.precision_recall_fscore_support(
        labels, predicted, labels=numbers, average=None, zero_division=np.nan
    )
    rows = found.per_class_table()
    assert [row.label for row in rows] == numbers.tolist()
    np.testing.assert_array_equal([row.support for row in rows], support)
    np.testing.assert_allclose([row[1:4] for row in rows], np.transpose(ratios), rtol=1e-15)
    assert np.isnan(rows[1].recall) and rows[1].f1 == 0 and np.isnan(rows[2].precision) and np.isnan(rows[-1].f1)
    report = sklearn.classification_report(labels, predicted, output_dict=True, zero_division=0)
    for how in ("macro", "weighted"):
        expected = report[f"{how} avg"]
        wanted = {"precision": expected["precision"], "recall": expected["recall"], "f1": expected["f1-score"]}
        assert found.average(how) == pytest.approx(wanted, rel=1e-12)
    assert found.average("micro") == pytest.approx(dict.fromkeys(("precision", "recall", "f1"), found.accuracy))


def test_a_row_without_a_prediction_is_an_example_of_its_class() -> None:
    label, predicted = np.array([0, 0, 1, 2]), np.array([0, UNRANKED, 1, 1])
    found = PerClass.of(label, predicted, 3)
    np.testing.assert_array_equal(found.recall, [0.5, 1, 0])
    np.testing.assert_array_equal(found.precision, [1, 0.5, np.nan])
    assert confused_pairs(label, predicted, 9) == [(2, 1, 1)]
    assert found.average("micro") == pytest.approx({"precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7})


def test_confused_pairs_are_the_largest_of_the_confusion_matrix() -> None:
    logits, labels = draw(12)
    found = evaluate(logits, labels)
    matrix = found.confusion.copy()
    np.fill_diagonal(matrix, 0)
    places = [(-matrix[a, b], a, b) for a in range(12) for b in range(12) if matrix[a, b]]
    expected = [(a, b, -count) for count, a, b in sorted(places)]
    assert found.confused(1000) == expected
    assert found.confused(3) == expected[:3]
    far = np.array([999_999, 3], np.int32)  # whose code does not fit 32 bits
    assert confused_pairs(far, far[::-1], 5) == [(3, 999_999, 1), (999_999, 3, 1)]
    assert confused_pairs(far, far, 5) == []


def test_what_is_said_of_probabilities_is_scikit_learns() -> None:
    logits, labels = draw(12)
    found = evaluate(logits, labels)
    odds = np.exp(logits.astype(np.float64))
    probabilities = odds / odds.sum(1, keepdims=True)
    assert found.nll == pytest.approx(sklearn.log_loss(labels, probabilities, labels=range(12)), rel=1e-6)
    assert found.brier == pytest.approx(((probabilities - np.eye(12)[labels]) ** 2).sum(1).mean(), rel=1e-6)
    curve = found.calibration()
    assert curve.counts.sum() == ROWS
    assert (curve.counts * np.nan_to_num(curve.accuracy)).sum() == pytest.approx(found.accuracy * ROWS)
    worst = found.top_losses(4)
    assert found.answers["loss"][worst].tolist() == sorted(found.answers["loss"], reverse=True)[:4]
    logits[17, 2] = np.nan
    assert evaluate(logits, labels).top_losses(1).tolist() == [17]


def test_the_first_classes_are_the_most_probable() -> None:
    logits, labels = draw(12)
    found = jax.device_get(metrics.answer(logits, labels, top=5))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(found["classes"], order)
    odds = np.exp(logits.astype(np.float64))
    expected = np.take_along_axis(odds / odds.sum(1, keepdims=True), order, 1)
    np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-5)


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


def test_the_loss_is_summed_where_float32_would_stop() -> None:
    """Ten million rows of which each is less than a rounding of their sum in float32."""
    losses = np.full(10_000_000, 0.1, np.float32)
    rows = np.zeros(len(losses), np.int8)
    found = Evaluation.of([{"loss": losses, "label": rows, "rank": rows, "mask": rows == 0}], 12)
    assert (found.count, found.accuracy) == (len(losses), 1.0)
    assert found.loss == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_sums_of_training_are_those_of_the_answers() -> None:
    logits, labels = draw(12)
    logits[::7, 3] = np.nan
    losses, mask = cross_entropy(logits, labels), np.arange(ROWS) % 3 > 0
    counts = jax.device_get(metrics.count(logits, labels, np.nan_to_num(losses), mask))
    found = Evaluation.of([{**jax.device_get(answer(logits, labels)), "mask": mask}], 12)
    assert counts["count"] == found.count
    assert counts["top1"] == round(found.accuracy * found.count)
    assert counts["loss"] == pytest.approx(np.nan_to_num(losses)[mask].sum(), rel=1e-6)


def test_a_label_outside_the_head_is_never_right() -> None:
    logits, labels = draw(6)
    rank = np.asarray(metrics.rank_of(logits, np.where(np.arange(ROWS) % 2, 6, -1).astype(np.int32)))
    assert (rank == 6).all()
    assert (np.asarray(metrics.rank_of(logits, labels)) < 6).all()


def test_memory_does_not_grow_with_the_classes_squared() -> None:
    """Of 20,000 classes, whose confusion matrix would take 3 GB, and 100 batches: a few MB."""
    rows = np.arange(200, dtype=np.int32)
    batch = {"label": rows, "predicted": rows, "rank": rows % 7, "loss": rows.astype(np.float32), "mask": rows >= 0}
    tracemalloc.start()
    found = Evaluation.of((batch for _ in range(100)), 20_000)
    record = found.record(tuple(map(str, range(20_000))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.count, record["count"]) == (20_000, 20_000) and "confusion" not in record
    assert peak < 10e6
