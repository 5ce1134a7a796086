"""Which examples make up a batch: pure functions of (seed, epoch, step), every example once."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsft.data.order import Order, balanced
from jaxsft.data.reading import EvalPlan, TrainPlan
from jaxsft.data.splits import divided, subset

LABELS = np.repeat(np.arange(4), [40, 30, 20, 10]).astype(np.int32)


@pytest.mark.parametrize(("keep_last", "steps", "seen"), [(False, 12, 96), (True, 13, 100)])
def test_an_epoch_has_every_example_once(keep_last: bool, steps: int, seen: int):
    order = Order(100, 8, seed=3, keep_last=keep_last)
    assert order.steps_per_epoch == steps
    for epoch in range(3):
        examples = np.concatenate([order[epoch * steps + i] for i in range(steps)])
        assert len(examples) == len(set(examples)) == seen
        assert examples.dtype == np.int32


def test_a_step_is_the_same_however_it_is_asked_for():
    forwards, backwards = Order(100, 8, seed=3), Order(100, 8, seed=3)
    want = [forwards[step] for step in range(40)]
    for step in reversed(range(40)):
        np.testing.assert_array_equal(backwards[step], want[step])
    assert not np.array_equal(want[0], want[12])  # the second epoch has another order
    assert not np.array_equal(want[0], Order(100, 8, seed=4)[0])


def test_balanced_classes_come_equally_often():
    for epoch in range(3):
        examples = balanced(0, epoch, LABELS)
        np.testing.assert_array_equal(np.bincount(LABELS[examples]), [25, 25, 25, 25])
        counts = np.bincount(examples, minlength=100)
        assert counts[LABELS == 0].max() == 1  # of 40 images 25, none twice
        assert set(counts[LABELS == 3]) == {2, 3}  # of 10 images 25: none a third time before all have come twice
    odd = balanced(0, 0, LABELS[:-1])
    assert sorted(np.bincount(LABELS[odd])) == [24, 25, 25, 25]


def test_order_of_balanced_batches():
    order = Order(100, 10, seed=0, labels=LABELS)
    np.testing.assert_array_equal(np.concatenate([order[i] for i in range(10)]), balanced(0, 0, LABELS))


def test_partners_are_neighbours_in_the_global_batch():
    order = Order(100, 8, seed=3)
    numbers = TrainPlan(order, partners=True)[5]
    np.testing.assert_array_equal(numbers["partner"], np.roll(order[5], 1))


@pytest.mark.parametrize(("size", "batch_size"), [(1, 4), (8, 4), (9, 4), (3, 1)])
def test_evaluation_covers_every_example_once(size: int, batch_size: int):
    plan = EvalPlan(size, batch_size)
    batches = [plan[step] for step in range(len(plan))]
    assert all(b["example"].shape == b["mask"].shape == (batch_size,) for b in batches)
    assert [i for b in batches for i in b["example"][b["mask"]]] == list(range(size))
    assert all((b["example"] < size).all() for b in batches)


def test_a_division_is_stratified_and_seeded():
    train, held = divided(LABELS, 0.1, seed=0)
    np.testing.assert_array_equal(np.bincount(LABELS[held]), [4, 3, 2, 1])
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.arange(100))
    np.testing.assert_array_equal(held, divided(LABELS, 0.1, seed=0)[1])
    assert not np.array_equal(held, divided(LABELS, 0.1, seed=1)[1])
    assert list(divided(np.array([0, 1, 1]), 0.01, seed=0)[0]) == [0, *divided(np.array([0, 1, 1]), 0.01, 0)[0][1:]]
    assert len(divided(np.array([0, 1, 1]), 0.01, seed=0)[1]) == 1  # a lone image is trained on, of two one is held out


@pytest.mark.parametrize(
    ("fraction", "per_class", "want"),
    [(1.0, None, [40, 30, 20, 10]), (0.1, None, [4, 3, 2, 1]), (0.01, None, [1, 1, 1, 1]), (1.0, 15, [15, 15, 15, 10])],
)
def test_subsets(fraction: float, per_class: int | None, want: list[int]):
    chosen = subset(LABELS, fraction, per_class, seed=0)
    np.testing.assert_array_equal(np.bincount(LABELS[chosen]), want)
    assert set(subset(LABELS, 0.05, None, seed=0)) <= set(subset(LABELS, 0.5, None, seed=0))
