"""Whether probabilities can be trusted, and how far results: held to definitions written out, and to torch's LBFGS."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn import calibration as sklearn_calibration
from sklearn import metrics as sklearn

from jaxsft.cli import UserError
from jaxsft.interpret import bootstrap, calibration
from jaxsft.interpret.calibration import calibrate, fit_temperature
from jaxsft.interpret.metrics import Evaluation
from jaxsft.interpret.multilabel import MultiLabelEvaluation

ROWS, CLASSES = 400, 7


def draw(sharpness: float = 1.0, classes: int = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 that are too large by `sharpness`, and labels drawn from what they would say without that."""
    rng = np.random.default_rng(0)
    logits = 1.5 * rng.standard_normal((ROWS, classes))
    odds = np.exp(logits)
    labels = np.array([rng.choice(classes, p=row / row.sum()) for row in odds])
    return (sharpness * logits).astype(np.float32), labels.astype(np.int32)


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits.astype(np.float64))
    return odds / odds.sum(1, keepdims=True)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_curve_is_that_of_guo_et_al(bins: int) -> None:
    """Their equations 2, 3 and 5, bin by bin."""
    logits, labels = draw(2.0)
    confidence, correct = softmax(logits).max(1), logits.argmax(1) == labels
    found = calibrate(confidence.astype(np.float32), correct, bins)
    ece, mce = 0.0, 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        assert found.counts[m] == inside.sum()
        assert np.isnan(found.accuracy[m]) == np.isnan(found.confidence[m]) == (not inside.any())
        if inside.any():
            assert found.accuracy[m] == pytest.approx(correct[inside].mean(), rel=1e-12)
            assert found.confidence[m] == pytest.approx(confidence[inside].mean(), rel=1e-6)  # float32
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            ece, mce = ece + inside.sum() / ROWS * gap, max(mce, gap)
    assert (found.ece, found.mce) == (pytest.approx(ece, rel=1e-6), pytest.approx(mce, rel=1e-6))
    assert ece > 0.1 or bins == 1
    np.testing.assert_allclose(found.edges, np.arange(bins + 1) / bins, rtol=1e-12)


def test_edges_belong_to_the_bin_below() -> None:
    found = calibrate(np.array([0.0, 0.5, 0.5000001, 1.0]), np.array([False, True, True, True]), 2)
    assert found.counts.tolist() == [2, 2]


def test_bins_of_equally_many() -> None:
    logits, labels = draw(2.0)
    found = calibrate(softmax(logits).max(1), logits.argmax(1) == labels, 8, adaptive=True)
    assert found.counts.tolist() == [ROWS // 8] * 8
    true, mean = sklearn_calibration.calibration_curve(
        logits.argmax(1) == labels, softmax(logits).max(1), n_bins=8, strategy="quantile"
    )
    # scikit-learn has a value on an edge in the bin above; of distinct values that moves at most one a bin.
    np.testing.assert_allclose(found.accuracy, true, atol=2 * 8 / ROWS)
    np.testing.assert_allclose(found.confidence, mean, atol=2 * 8 / ROWS)


def test_what_is_no_number_is_in_no_bin() -> None:
    confidence, correct = np.array([0.9, np.nan, 0.2]), np.array([True, True, False])
    found = calibrate(confidence, correct)
    assert found.counts.sum() == 2
    assert found.ece == pytest.approx((0.1 + 0.2) / 2)
    nothing = calibrate(confidence[1:2], correct[1:2])
    assert np.isnan(nothing.ece) and np.isnan(nothing.mce) and nothing.counts.sum() == 0


def lbfgs(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature as PyTorch's users fit it."""
    scores = torch.from_numpy(logits.astype(np.float64))
    inverse = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")  # fmt: skip
    if labels.ndim == 2:
        target, loss = torch.from_numpy(labels.astype(np.float64)), torch.nn.BCEWithLogitsLoss()
    else:
        target, loss = torch.from_numpy(labels.astype(np.int64)), torch.nn.CrossEntropyLoss()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(inverse * scores, target)
        value.backward()
        return value

    optimizer.step(closure)
    return 1 / inverse.item()


@pytest.mark.parametrize("sharpness", [0.03, 0.3, 1.0, 4.0, 30.0])
def test_the_temperature_is_what_lbfgs_finds(sharpness: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is as far off as the logits are too sharp."""
    monkeypatch.setattr(calibration, "ROWS", 64)  # the last part holds 16
    logits, labels = draw(sharpness)
    found = fit_temperature(logits, labels)
    # LBFGS ends where its own gradient or change is small enough.
    assert found == pytest.approx(lbfgs(logits, labels), rel=1e-6)
    assert found == pytest.approx(sharpness, rel=0.2)  # 400 examples do not say it any closer
    near = (found, found * 1.01, found / 1.01)
    losses = [sklearn.log_loss(labels, softmax(logits / t), labels=range(CLASSES)) for t in near]
    assert losses[0] == min(losses)


def test_the_temperature_of_several_labels_an_image() -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((ROWS, 3))
    labels = (rng.random((ROWS, 3)) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
    found = fit_temperature((3 * logits).astype(np.float32), labels)
    assert found == pytest.approx(lbfgs((3 * logits).astype(np.float32), labels), rel=1e-6)
    assert found == pytest.approx(3, rel=0.25)


def test_a_temperature_that_is_nowhere_is_an_error() -> None:
    logits, labels = draw()
    with pytest.raises(UserError, match="right of all 400 images, and could be surer without end; fit it on a split"):
        fit_temperature(logits, logits.argmax(1))
    with pytest.raises(UserError, match="the network knows nothing of these labels"):
        fit_temperature(logits, logits.argmin(1))
    with pytest.raises(UserError, match="computes no numbers; take another --checkpoint"):
        fit_temperature(np.where(logits > 3, np.nan, logits), labels)
    with pytest.raises(UserError, match="knows nothing"):
        fit_temperature(np.zeros_like(logits), labels)


def test_what_a_temperature_would_say() -> None:
    logits, labels = draw()
    probability, right, nll = calibration.at_temperature(logits, labels, 2.5)
    expected = softmax(logits / 2.5)
    np.testing.assert_allclose(probability, expected.max(1), rtol=1e-6)
    np.testing.assert_array_equal(right, logits.argmax(1) == labels)
    assert nll.mean() == pytest.approx(sklearn.log_loss(labels, expected, labels=range(CLASSES)), rel=1e-6)
    has = (labels[:, None] == np.arange(CLASSES)).astype(np.uint8)
    large = 128 * logits.astype(np.float64)
    probability, right, nll = calibration.at_temperature(large, has, 2.0)
    np.testing.assert_allclose(probability, torch.sigmoid(torch.from_numpy(large / 2)).ravel(), rtol=1e-12)
    loss = torch.nn.BCEWithLogitsLoss()(torch.from_numpy(large / 2), torch.from_numpy(has).double())
    assert nll.mean() == pytest.approx(float(loss), rel=1e-12)
    assert right.tolist() == has.ravel().astype(bool).tolist()


def evaluation(rows: int = ROWS, classes: int = CLASSES) -> Evaluation:
    """Of random answers, a third of them wrong."""
    rng = np.random.default_rng(3)
    label = rng.integers(0, classes, rows)
    rank = np.where(rng.random(rows) < 0.7, 0, rng.integers(1, classes, rows))
    predicted = np.where(rank == 0, label, (label + rank) % classes)
    answers = {"label": label, "predicted": predicted, "rank": rank, "loss": rng.exponential(1, rows)}
    return Evaluation(classes, {**answers, "probability": rng.uniform(0.3, 1, rows)})


def test_intervals_are_the_quantiles_over_resamples() -> None:
    """Each resample evaluated as a set of its own."""
    found, number = evaluation(), 60
    counts = np.concatenate([*bootstrap.resamples(ROWS, number)]).astype(int)
    assert counts.shape == (number, ROWS) and (counts.sum(1) == ROWS).all()
    values: dict[str, list[float]] = {name: [] for name in ("accuracy", "top5", "loss", "f1_macro", "ece")}
    for row in counts:
        chosen = np.repeat(np.arange(ROWS), row)
        own = Evaluation(CLASSES, {name: value[chosen] for name, value in found.answers.items()})
        for name in ("accuracy", "top5", "loss"):
            values[name].append(getattr(own, name))
        values["f1_macro"].append(
            sklearn.f1_score(own.answers["label"], own.answers["predicted"], average="macro", zero_division=0)
        )
        values["ece"].append(own.calibration().ece)
    intervals = found.interval(number)
    for name, of_resamples in values.items():
        np.testing.assert_allclose(intervals[name], np.quantile(of_resamples, [0.025, 0.975]), rtol=1e-9, err_msg=name)
        assert intervals[name][0] < intervals[name][1]


def test_intervals_are_the_same_again_and_as_wide_as_the_normal_ones() -> None:
    found = evaluation(2000)
    first = found.interval()
    assert first == found.interval() != found.interval(seed=1)
    half = 1.96 * (found.accuracy * (1 - found.accuracy) / 2000) ** 0.5
    np.testing.assert_allclose(first["accuracy"], [found.accuracy - half, found.accuracy + half], atol=0.2 * half)
    half = 1.96 * found.answers["loss"].std() / 2000**0.5
    np.testing.assert_allclose(first["loss"], [found.loss - half, found.loss + half], atol=0.2 * half)


def test_intervals_of_several_labels_an_image() -> None:
    rng = np.random.default_rng(4)
    label = (rng.random((ROWS, 5)) < 0.3).astype(np.uint8)
    logits = rng.standard_normal((ROWS, 5)) + 2 * label - 1
    probabilities, loss = 1 / (1 + np.exp(-logits)), rng.exponential(1, ROWS)
    batch = {"label": label, "logits": logits, "predicted": logits > 0, "probabilities": probabilities, "loss": loss}
    found = MultiLabelEvaluation.of([{**batch, "mask": loss >= 0}], 5)
    values: dict[str, list[float]] = {name: [] for name in ("accuracy", "loss", "f1_micro", "f1_macro", "ece")}
    for row in np.concatenate([*bootstrap.resamples(ROWS, 40)]).astype(int):
        chosen = np.repeat(np.arange(ROWS), row)
        own = MultiLabelEvaluation.of([{**{k: v[chosen] for k, v in batch.items()}, "mask": np.ones(ROWS, bool)}], 5)
        for name in ("accuracy", "loss", "f1_micro", "f1_macro"):
            values[name].append(getattr(own, name))
        values["ece"].append(own.calibration().ece)
    for name, interval in found.interval(40).items():
        np.testing.assert_allclose(interval, np.quantile(values.pop(name), [0.025, 0.975]), rtol=1e-9, err_msg=name)
    assert not values


def test_a_share_of_all_or_none_has_wilsons_interval() -> None:
    found = evaluation(40)
    answers = {**found.answers, "rank": np.zeros(40, int), "predicted": found.answers["label"]}
    intervals = Evaluation(CLASSES, answers).interval(20)
    expected = scipy.stats.binomtest(40, 40).proportion_ci(method="wilson")
    assert intervals["accuracy"] == intervals["top5"] == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert intervals["accuracy"][0] < 0.93
    expected = scipy.stats.binomtest(3, 40).proportion_ci(method="wilson")
    assert bootstrap.wilson(3, 40) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert bootstrap.wilson(0, 40)[0] == 0


def test_memory_does_not_grow_with_the_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 examples: 50 resamples at once would be 8 MB of counts alone, and as much for what is drawn."""
    monkeypatch.setattr(bootstrap, "MOST_NUMBERS", 40_000)
    found = evaluation(20_000, 300)
    tracemalloc.start()
    found.interval(50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6  # the bins of each example are 2.4 MB, and what they are made of twice that
