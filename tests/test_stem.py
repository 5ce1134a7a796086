"""A stem's batch norm, ReLU and max-pool as one operation: the same values and gradients as one after the other."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.models import layers, stem
from jaxsft.models.blocks import norm_relu_pool
from jaxsft.models.densenet import DenseNet
from jaxsft.models.normalization import batch_norm
from jaxsft.models.pooling import max_pool
from jaxsft.models.resnet import BasicBlock, ResNet
from jaxsft.models.shufflenetv2 import ShuffleNetV2

EPSILON = 1e-5
SCALE = (0.7, -1.3, 0.01, 2.0, -0.2)  # a channel turned round must be too


def one_after_the_other(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, Any]:
    """Each by its own operation, which other tests hold against torch."""
    y, mean, var = batch_norm(x, scale, bias, EPSILON)
    return max_pool(nn.relu(y)), (mean, var)


def together(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, Any]:
    y, mean, var = stem.norm_relu_pool(x, scale, bias, EPSILON)
    return y, (mean, var)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 10), (1, 3)])
def test_values_and_gradients_are_those_of_one_after_the_other(height: int, width: int) -> None:
    """In float64: values to the bit, since rounding is monotone too; gradients, whose sums are in another order, to
    1e-13, a few hundred roundings."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        arguments = [
            jnp.asarray(rng.normal(size=(4, height, width, 5))),
            jnp.asarray(SCALE),
            jnp.asarray(rng.normal(size=5)),
        ]
        expected, pull, expected_statistics = jax.vjp(one_after_the_other, *arguments, has_aux=True)
        found, own_pull, statistics = jax.vjp(together, *arguments, has_aux=True)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(statistics, expected_statistics, rtol=0, atol=1e-14)
        dy = jnp.asarray(rng.normal(size=expected.shape))
        for ours, theirs in zip(own_pull(dy), pull(dy), strict=True):
            assert np.abs(ours - theirs).max() <= 1e-13 * np.abs(theirs).max()


def test_statistics_of_several_devices_are_shared() -> None:
    """As `batch_norm` shares them: two devices with half of the images each give what one gives with all of them."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        x, scale, bias = jnp.asarray(rng.normal(size=(4, 6, 6, 5))), jnp.asarray(SCALE), jnp.asarray(rng.normal(size=5))
        halves = x.reshape(2, 2, 6, 6, 5)

        def total(form: Any, x: jax.Array, axis_name: str | None) -> jax.Array:
            return jnp.square(form(x, scale, bias, EPSILON, axis_name)[0]).sum()

        expected = jax.grad(lambda x: total(stem.norm_relu_pool, x, None))(x)
        shared = jax.vmap(jax.grad(lambda x: total(stem.norm_relu_pool, x, "devices")), axis_name="devices")
        np.testing.assert_allclose(shared(halves).reshape(x.shape), expected, rtol=0, atol=1e-12)


class Stem(nn.Module):
    """The end of a stem."""

    frozen: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return norm_relu_pool(layers.BatchNorm(frozen=self.frozen, name="norm"), x, train)


@pytest.mark.parametrize(
    ("dtype", "train", "frozen", "fused"),
    [("bfloat16", True, (), True), ("bfloat16", True, ("norm",), False), ("bfloat16", False, (), False),
     ("float32", True, (), False)],
)  # fmt: skip
def test_where_it_is_one(dtype: str, train: bool, frozen: tuple[str, ...], fused: bool, monkeypatch: Any) -> None:
    """In training, in bfloat16, by the batch's statistics; its value and buffers are the same to the bit."""
    x = jax.random.normal(jax.random.key(0), (4, 6, 8, 5)).astype(dtype)
    module, called = Stem(frozen), []
    values = module.init(jax.random.key(1), x, False)
    values = {**values, "params": {"norm": {"scale": jnp.asarray(SCALE), "bias": jnp.linspace(-1, 1, 5)}}}
    own = stem.norm_relu_pool
    monkeypatch.setattr(stem, "norm_relu_pool", lambda *a: called.append(a) or own(*a))
    found = module.apply(values, x, train, mutable=["batch_stats"])
    assert bool(called) == fused
    monkeypatch.setattr(layers.BatchNorm, "may_fuse", lambda self, x, train: False)
    expected = module.apply(values, x, train, mutable=["batch_stats"])
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), found, expected))


@pytest.mark.parametrize(
    "network",
    [partial(ResNet, (1,), BasicBlock, width=16), partial(DenseNet, (1, 1), growth=8, width=16),
     partial(ShuffleNetV2, (1, 1, 1), (8, 16, 32, 64, 64))],
    ids=["resnet", "densenet", "shufflenet"],
)  # fmt: skip
def test_the_families_that_end_their_stem_so_use_it(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called, own = [], stem.norm_relu_pool
    monkeypatch.setattr(stem, "norm_relu_pool", lambda *a: called.append(a) or own(*a))
    model = network(num_classes=3, dtype=jnp.bfloat16)
    images = jnp.ones((2, 32, 32, 3))
    jax.eval_shape(lambda key: model.init_with_output(key, images, train=True), jax.random.key(0))
    assert called
