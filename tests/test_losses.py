"""Losses against torch's in float64, of one label an image and of several; and the weights that data bring along."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from ml_collections import ConfigDict
from sklearn.utils.class_weight import compute_class_weight

from jaxsft import config as config_module
from jaxsft.learn.losses import balanced_weights, make_loss, numeric_weights

ROWS, CLASSES = 12, 4
WEIGHTS = (0.2, 1.0, 3.0, 0.7)
ROUNDING = {"rtol": 1e-12, "atol": 1e-14}  # float64 in another order
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(0, 3, (ROWS, CLASSES))
LABELS = {
    "one": RANDOM.integers(0, CLASSES, ROWS, dtype=np.int32),
    "several": (RANDOM.random((ROWS, CLASSES)) < 0.4).astype(np.uint8),  # some rows have none
}
CASES = [*itertools.product(LABELS, ((), WEIGHTS))]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def one_hot(labels: np.ndarray) -> torch.Tensor:
    """As float64 [N, K], of one label an image or of several."""
    return torch.tensor(labels if labels.ndim == 2 else np.eye(CLASSES)[labels], dtype=torch.float64)


def assert_is(found, expected: torch.Tensor, logits: torch.Tensor) -> None:
    """The loss and its gradient; `found` is a function of the logits."""
    expected.backward()
    value, gradient = jax.value_and_grad(found)(LOGITS)
    np.testing.assert_allclose(value, expected.item(), **ROUNDING)
    np.testing.assert_allclose(gradient, logits.grad.numpy(), **ROUNDING)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "weights"), CASES)
def test_bce_is_torchs(kind: str, weights: tuple[float, ...], smoothing: float) -> None:
    """Smoothed as timm's BinaryCrossEntropy smooths one label, and as two classes are where there are several."""
    targets = one_hot(LABELS[kind])
    off = smoothing / (CLASSES if kind == "one" else 2)
    targets = (1 - smoothing + off) * targets + off * (1 - targets)
    weight = torch.tensor(weights, dtype=torch.float64) if weights else None
    logits = torch.tensor(LOGITS, requires_grad=True)
    loss = make_loss(smoothing, weights, name="bce")
    expected = torch.nn.BCEWithLogitsLoss(weight)(logits, targets)
    assert_is(lambda x: loss(x, LABELS[kind]).mean(), expected, logits)
    assert loss(LOGITS, LABELS[kind]).shape == (ROWS,)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize(("kind", "weights"), CASES)
def test_focal_is_torchvisions_or_its_formula(kind: str, weights: tuple[float, ...], gamma: float) -> None:
    logits, labels = torch.tensor(LOGITS, requires_grad=True), LABELS[kind]
    weight = torch.tensor(weights or (1.0,) * CLASSES, dtype=torch.float64)
    if kind == "one":
        own = torch.tensor(labels).long()
        p = torch.softmax(logits, 1)[torch.arange(ROWS), own]
        expected = (-weight[own] * (1 - p) ** gamma * torch.log(p)).mean()
    else:
        terms = torchvision.ops.sigmoid_focal_loss(logits, one_hot(labels), alpha=-1, gamma=gamma, reduction="none")
        expected = (weight * terms).mean()
    loss = make_loss(0.0, weights, name="focal", gamma=gamma)
    assert_is(lambda x: loss(x, labels).mean(), expected, logits)


def test_focal_of_gamma_0_is_the_plain_loss() -> None:
    for kind, plain in (("one", "cross_entropy"), ("several", "bce")):
        losses = [make_loss(name=name, gamma=0.0)(LOGITS, LABELS[kind]) for name in ("focal", plain)]
        np.testing.assert_allclose(*losses, **ROUNDING)


@pytest.mark.parametrize("name", ["bce", "focal"])
@pytest.mark.parametrize("kind", LABELS)
def test_logits_beyond_all_bounds_have_gradients(name: str, kind: str) -> None:
    """Right and wrong ones, in float32: exp of them is infinite, and 1 - p is 0 where p rounds to 1."""
    wrong = np.arange(ROWS)[:, None] % 2
    logits = jnp.asarray(1e4 * (-1.0) ** wrong * (2 * one_hot(LABELS[kind]).numpy() - 1), jnp.float32)
    loss = make_loss(name=name, gamma=0.5)
    value, gradient = jax.value_and_grad(lambda x: loss(x, LABELS[kind]).mean())(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert float(value) > 100


@pytest.mark.parametrize("kind", LABELS)
def test_bce_of_mixed_labels_is_the_mix_of_both(kind: str) -> None:
    labels, partners, share = LABELS[kind], np.roll(LABELS[kind], 1, axis=0), 0.3
    soft = share * one_hot(labels) + (1 - share) * one_hot(partners)
    expected = torch.nn.BCEWithLogitsLoss(reduction="none")(torch.tensor(LOGITS), soft).mean(1)
    loss = make_loss(name="bce")
    found = share * loss(LOGITS, labels) + (1 - share) * loss(LOGITS, partners)
    np.testing.assert_allclose(found, expected.numpy(), **ROUNDING)


def test_balanced_weights_are_scikit_learns() -> None:
    labels = np.repeat(np.arange(4, dtype=np.int32), (1, 7, 3, 9))
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(balanced_weights(labels, 4), expected, rtol=1e-15)
    assert np.mean(np.array(expected)[labels]) == pytest.approx(1)
    # Two of six classes have no image: the others' are what scikit-learn makes of them alone.
    apart = 2 * labels % 6 + labels // 3
    present = np.unique(apart)
    found = np.array(balanced_weights(apart, 6))
    np.testing.assert_allclose(found[present], compute_class_weight("balanced", classes=present, y=apart), rtol=1e-15)
    assert set(np.delete(found, present)) == {1.0}


def test_balanced_weights_of_several_labels_count_each() -> None:
    labels = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]], np.uint8)
    each = np.nonzero(labels)[1]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=each)
    np.testing.assert_allclose(balanced_weights(labels, 4), (*expected, 1.0), rtol=1e-15)


def weighted(weights: tuple[Any, ...]) -> ConfigDict:
    config = config_module.default()
    config.train.class_weights = weights
    return config


def test_a_config_may_ask_for_balanced_weights() -> None:
    labels = np.array([0, 0, 1], np.int32)
    assert numeric_weights(weighted(("balanced",)), labels, 2) == balanced_weights(labels, 2)
    assert numeric_weights(weighted((1.0, 2.0)), labels, 2) == (1.0, 2.0)
    assert numeric_weights(weighted(()), labels, 2) == ()
