"""Dropout and stochastic depth: torch's arithmetic, and draws that belong to an example, whatever lies beside it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchvision.ops import StochasticDepth as TorchStochasticDepth

from jaxsft.learn.objective import network_keys, step_key
from jaxsft.models.stochastic import MASKS, Dropout, Keys, StochasticDepth
from jaxsft.parity.networks import Handed

RATE = 0.3
X = np.random.default_rng(0).standard_normal((64, 5, 7, 3), np.float32)
KINDS = (Dropout, StochasticDepth)


def keys(examples: Any = range(64), step: int = 0, seed: int = 0) -> jax.Array:
    return network_keys(step_key(seed, jnp.int32(step)), jnp.asarray(examples, jnp.int32))


def drop(layer: Any, x: Any = X, keys: Keys = None) -> tuple[np.ndarray, np.ndarray]:
    """The output and what was kept, bool."""
    y, found = layer.apply({}, x, keys, mutable=[MASKS])
    return np.asarray(y), np.asarray(found[MASKS]["kept"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_divided_as_in_torch(kind: type[nn.Module]) -> None:
    y, kept = drop(kind(RATE), keys=keys())
    torchs = Handed(RATE).train()
    torchs.masks = [torch.from_numpy(kept.copy())]
    np.testing.assert_allclose(y, torchs(torch.from_numpy(X)).numpy(), rtol=2e-7)  # one rounding of float32 each
    assert kept.shape == (X.shape if kind is Dropout else (64, 1, 1, 1))
    # as often as torch's own: the mean of n draws lies within four deviations
    torch.manual_seed(0)
    theirs = torch.nn.Dropout(RATE) if kind is Dropout else TorchStochasticDepth(RATE, "row")
    torch_kept = theirs.train()(torch.ones(X.shape)) > 0
    deviation = (RATE * (1 - RATE) / kept.size) ** 0.5
    assert abs(kept.mean() - (1 - RATE)) < 4 * deviation
    assert abs(torch_kept.float().mean().item() - (1 - RATE)) < 4 * deviation


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_dropped_without_keys_or_at_a_rate_of_zero(kind: type[nn.Module]) -> None:
    np.testing.assert_array_equal(kind(RATE).apply({}, X, None), X)
    np.testing.assert_array_equal(kind(0.0).apply({}, X, keys()), X)
    np.testing.assert_array_equal(kind(1.0).apply({}, X, keys()), np.zeros_like(X))


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_belongs_to_its_example(kind: type[nn.Module]) -> None:
    """In the batch, in a part of it, in another order, and in float64."""
    whole, kept = drop(kind(RATE), keys=keys())
    for rows in (np.arange(32), np.arange(32, 64), np.arange(64)[::-1], np.array([7])):
        np.testing.assert_array_equal(drop(kind(RATE), X[rows], keys(rows))[0], whole[rows])
    with jax.enable_x64(True):
        np.testing.assert_array_equal(drop(kind(RATE), X.astype(np.float64), keys())[1], kept)


class Twice(nn.Module):
    """Two layers, the second called twice."""

    @nn.compact
    def __call__(self, x: jax.Array, keys: Keys) -> list[jax.Array]:
        second = Dropout(RATE, name="second")
        return [Dropout(RATE, name="first")(x, keys), second(x, keys), second(x, keys, draw=1)]


def test_every_place_step_and_seed_draws_anew() -> None:
    ones = np.ones_like(X)
    draws = Twice().apply({}, ones, keys())
    draws += [
        Twice().apply({}, ones, keys(**other))[0] for other in ({"step": 1}, {"seed": 1}, {"examples": range(1, 65)})
    ]
    draws = [np.asarray(draw) > 0 for draw in draws]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            # independent: both keep or both drop
            assert abs((one == other).mean() - (RATE**2 + (1 - RATE) ** 2)) < 0.05
