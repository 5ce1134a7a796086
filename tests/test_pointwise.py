"""The convolution fused with its batch norm: the same values and gradients as one after the other."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.models import layers, pointwise
from jaxsft.models.family import init_variables
from jaxsft.models.pointwise import conv_norm
from jaxsft.models.resnet import Bottleneck, ResNet

EPSILON = 1e-5
FOR_CUDNN = {"_scaled": pointwise._scaled_by_kernel, "_sum": pointwise._sum_by_convolution}  # no CPU's choice


def one_after_the_other(x: jax.Array, kernel: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """By the definition, for autodiff."""
    z = jnp.einsum("nhwa,ab->nhwb", x, kernel[0, 0])
    return (z - z.mean((0, 1, 2))) / jnp.sqrt(z.var((0, 1, 2)) + EPSILON) * scale + bias


@pytest.mark.parametrize("replaced", [{}, FOR_CUDNN], ids=["", "for cuDNN"])
@pytest.mark.parametrize(("size", "channels"), [((5, 7), (6, 10)), ((1, 1), (3, 2)), ((4, 4), (1, 5))])
def test_values_and_gradients_are_those_of_the_definition(
    size: tuple[int, int], channels: tuple[int, int], replaced: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where the algebra shows: 1e-13, a few hundred roundings."""
    for name, function in replaced.items():
        monkeypatch.setattr(pointwise, name, function)
    rng = np.random.default_rng(0)
    shapes = (3, *size, channels[0]), (1, 1, *channels), channels[1:], channels[1:]
    with jax.enable_x64(True):
        arguments = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        expected, pull = jax.vjp(one_after_the_other, *arguments)
        found, own_pull, _ = jax.vjp(
            lambda *a: (lambda y, mean, var: (y, (mean, var)))(*conv_norm(*a, EPSILON)),
            *arguments,
            has_aux=True,
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
        dy = jnp.asarray(rng.normal(size=expected.shape))
        for ours, theirs in zip(own_pull(dy), pull(dy), strict=True):
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() <= 1e-13 * np.abs(theirs).max()


class Pair(nn.Module):
    """A 1x1 convolution and its batch norm."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = layers.Conv(self.features, 1, self.stride, name="conv")
        return layers.pointwise(conv, layers.BatchNorm(name="norm"), x, True)


@pytest.mark.parametrize(("features", "stride", "fused"), [(8, 1, True), (8, 2, True), (6, 1, True), (5, 1, False)])
def test_fused_is_what_is_no_wider_than_its_result(
    features: int, stride: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, and is the same to a few of its roundings, at a stride too."""
    x = jax.random.normal(jax.random.key(0), (4, 5, 6, 6)).astype(jnp.bfloat16)
    pair = Pair(features, stride)
    called = []
    monkeypatch.setattr(layers, "conv_norm", lambda *a: called.append(a) or conv_norm(*a))
    values = pair.init(jax.random.key(1), x)
    called.clear()
    found, _ = pair.apply(values, x, mutable=["batch_stats"])
    assert bool(called) == fused
    monkeypatch.setattr(layers.BatchNorm, "may_fuse", lambda self, x, train: False)
    expected, _ = pair.apply(values, x, mutable=["batch_stats"])
    assert found.shape == expected.shape == (4, -(-5 // stride), 6 // stride, features)
    np.testing.assert_allclose(found.astype("float32"), expected.astype("float32"), rtol=0, atol=5e-2)


def gradients(model, values, images: jax.Array, fused: bool, monkeypatch) -> tuple[dict, dict]:
    """By the parameters of the sum of the squared logits, and the buffers afterwards."""
    with monkeypatch.context() as patch:
        if not fused:
            patch.setattr(layers.BatchNorm, "may_fuse", lambda self, x, train: False)

        def loss(params):
            variables = {"params": params, "batch_stats": values["batch_stats"]}
            logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return jnp.square(logits).mean(), updated["batch_stats"]

        return jax.jit(jax.grad(loss, has_aux=True))(values["params"])


def test_a_network_in_bfloat16_learns_the_same_with_and_without(monkeypatch) -> None:
    """As near to float32 as the unfused bfloat16 is: a rounding is 4e-3, here a gradient loses a fifth.

    For cuDNN nearly so: the rounded constants move all of a channel alike, which shows where the mean is taken, in the
    gradients by the head (0.5 % instead of 0.2, others as before).
    """
    images = jax.random.normal(jax.random.key(1), (16, 32, 32, 3))
    network = partial(ResNet, (1, 1), Bottleneck, num_classes=10, width=16)
    exact_model = network()
    values = init_variables(exact_model, 0, 32)
    exact, exact_stats = gradients(exact_model, values, images, False, monkeypatch)
    model = network(dtype=jnp.bfloat16)
    off = {}
    for way in (True, False, "for cuDNN"):
        if way == "for cuDNN":
            for name, function in FOR_CUDNN.items():
                monkeypatch.setattr(pointwise, name, function)
        found, stats = gradients(model, values, images, bool(way), monkeypatch)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, found, exact))
        distance = jax.tree.map(
            lambda a, b: jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()), found, exact
        )
        off[way] = np.array(jax.tree.leaves(distance))
        for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(exact_stats), strict=True):
            assert np.abs(a - b).max() <= 2e-2 * np.abs(b).max()
    assert (off[True] <= 1.5 * off[False]).all(), (off[True].max(), off[False].max())
    apart = off["for cuDNN"] / off[False]
    assert apart.max() <= 3 and apart.mean() <= 1.3, (apart.max(), apart.mean())
