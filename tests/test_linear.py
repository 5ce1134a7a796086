"""Linear layers and GELU are torch's, with their gradients, on the CPU, which has forms of its own, and elsewhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxsft.models.blocks import gelu
from jaxsft.models.matmul import matmul

# Relative, absolute. float64: rounding of an erf. float32: another polynomial of it, and far to the left, where 1 + erf
# is small, both have lost its digits. bfloat16: both compute in float32 and round once, a step apart at most.
TOLERANCES = {"float64": (1e-15, 1e-15), "float32": (5e-7, 1e-6), "bfloat16": (2.0**-7, 1e-6)}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gelu_is_torchs(dtype: str) -> None:
    """Over all that tells it from its tanh form, and far into both tails, where neither is a number times 0."""
    values = np.concatenate([np.linspace(-9, 9, 1801), [-40.0, 0.0, 40.0]])
    slopes = np.random.default_rng(0).normal(size=values.shape)
    x = torch.tensor(values, dtype=getattr(torch, dtype), requires_grad=True)
    y = torch.nn.functional.gelu(x)
    y.backward(torch.tensor(slopes, dtype=x.dtype))
    ours, pull = jax.vjp(gelu, jnp.asarray(values, dtype))
    for a, b in ((ours, y), (pull(jnp.asarray(slopes, dtype))[0], x.grad)):
        assert a.dtype == dtype
        relative, absolute = TOLERANCES[dtype]
        b = b.detach().double().numpy()
        np.testing.assert_allclose(a.astype("float64"), b, rtol=relative, atol=absolute)


def test_gelu_keeps_its_input_alone() -> None:
    x = jnp.ones((4, 8), "bfloat16")
    kept = jax.tree.leaves(jax.vjp(gelu, x)[1])
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(x.shape, x.dtype)]
    step = jax.jit(jax.value_and_grad(lambda x: gelu(x).sum(dtype="float32"))).lower(x)
    assert step.compile().as_text().count(" erf(") == 2  # the gradient's is its own: else XLA keeps the first one


@pytest.mark.parametrize("features", [5, 24])
@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 3, 12), (2, 3, 4, 12)])
def test_matmul_is_the_plain_product(shape: tuple[int, ...], features: int) -> None:
    """The narrower operand first and second, in the gradient by the matrix; of one row, and of several axes of rows."""
    random = np.random.default_rng(0)
    x, matrix, dy = (random.normal(size=size) for size in (shape, (12, features), (*shape[:-1], features)))
    ours, expected = (jax.vjp(product, x, matrix) for product in (matmul, jnp.matmul))
    for a, b in zip((ours[0], *ours[1](dy)), (expected[0], *expected[1](dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-14 * abs(b).max())


def test_an_accelerator_gets_the_plain_product() -> None:
    x, matrix = jnp.zeros((2, 3, 4), "float32"), jnp.zeros((4, 5), "float32")
    step = jax.jit(jax.grad(lambda x, matrix: jnp.tanh(matmul(x, matrix)).sum(), (0, 1))).trace(x, matrix)
    for platform, reshaped in (("cpu", True), ("cuda", False), ("tpu", False)):
        assert ("stablehlo.reshape" in step.lower(lowering_platforms=(platform,)).as_text()) == reshaped, platform
