"""`conv2d`, `max_pool` and `relu` are the plain XLA operations to rounding, with their gradients, where they are used.

The oracle is `lax.conv_general_dilated` in float64. What is run on the CPU here is every branch of the rule in
convolution.py; what an accelerator would run is read from the lowered program.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxsft.models import convolution, pooling, winograd
from jaxsft.models.blocks import relu
from jaxsft.models.convolution import conv2d
from jaxsft.models.pooling import max_pool

# Relative to the largest value of the array. float64: rounding. float32: sums of up to 9 * 130 products, and Winograd
# adds a bit (measured: at most 7e-7). bfloat16: one rounding of the result, 2^-9, and one of each gradient.
TOLERANCES = {"float64": 2e-14, "float32": 3e-6, "bfloat16": 8e-3}

# name: batch, height, width, channels in, out, kernel, stride, padding, groups
SHAPES = {
    "plain 3x3": (2, 9, 11, 8, 6, 3, 1, 1, 1),
    "plain 3x3, dots by the kernel": (2, 9, 11, 20, 16, 3, 1, 1, 1),
    "winograd": (3, 8, 13, 128, 130, 3, 1, 1, 1),
    "winograd in parts": (6, 29, 31, 128, 128, 3, 1, 1, 1),
    "winograd, 4x4": (24, 4, 4, 64, 64, 3, 1, 1, 1),
    "too few images for winograd": (2, 9, 7, 64, 66, 3, 1, 1, 1),
    "wide, 2x2": (17, 2, 2, 64, 64, 3, 1, 1, 1),
    "few pixels, 2x2": (3, 2, 2, 64, 66, 3, 1, 1, 1),
    "few pixels, 1x1": (1, 1, 1, 64, 64, 3, 1, 1, 1),
    "few pixels, strided": (2, 9, 11, 66, 64, 3, 2, 1, 1),
    "few pixels, not padded": (1, 8, 8, 64, 64, 5, 1, 0, 1),
    "wide, fewer channels out": (2, 6, 5, 136, 72, 3, 2, 1, 1),
    "tiny 3x3": (2, 2, 3, 16, 16, 3, 1, 1, 1),
    "tiny 3x3, few channels": (2, 1, 2, 3, 4, 3, 1, 1, 1),
    "strided 3x3": (2, 12, 14, 16, 20, 3, 2, 1, 1),
    "strided 3x3, odd": (1, 11, 15, 16, 20, 3, 2, 1, 1),
    "strided 3x3, tiny": (2, 2, 2, 16, 20, 3, 2, 1, 1),
    "strided 3x3, one pixel": (2, 1, 1, 16, 20, 3, 2, 1, 1),
    "1x1": (2, 8, 9, 8, 12, 1, 1, 0, 1),
    "1x1 strided": (1, 9, 8, 8, 12, 1, 2, 0, 1),
    "stem": (2, 32, 32, 3, 8, 7, 2, 3, 1),
    "stem, odd": (1, 97, 131, 3, 8, 7, 2, 3, 1),
    "stem, image smaller than the kernel": (2, 4, 5, 3, 8, 7, 2, 3, 1),
    "stem, one pixel": (1, 1, 1, 3, 8, 7, 2, 3, 1),
    "stride larger than the kernel": (2, 9, 8, 20, 8, 2, 3, 0, 1),
    "patches": (2, 12, 8, 3, 8, 4, 4, 0, 1),
    "patches, left over": (2, 7, 9, 5, 6, 2, 2, 0, 1),
    "5x5, stride 3": (2, 5, 6, 20, 8, 5, 3, 2, 1),
    "no padding": (1, 8, 8, 128, 128, 3, 1, 0, 1),
    "wide padding": (2, 3, 3, 16, 16, 3, 1, 2, 1),
    "groups, more channels out": (2, 8, 9, 16, 24, 3, 2, 1, 4),
    "groups of 1, two channels out": (3, 7, 6, 6, 12, 3, 1, 1, 6),
    "groups of 4": (4, 7, 6, 16, 16, 3, 1, 1, 4),
    "groups of 3, strided, 2x3": (5, 2, 3, 9, 9, 3, 2, 1, 3),
    "groups of 20, strided": (2, 9, 6, 40, 40, 3, 2, 1, 2),
    "depthwise 3x3": (8, 9, 11, 6, 6, 3, 1, 1, 6),
    "depthwise 3x3, strided": (3, 36, 35, 6, 6, 3, 2, 1, 6),
    "depthwise 3x3, wide image": (2, 3, 64, 5, 5, 3, 1, 1, 5),
    "depthwise 5x5": (4, 7, 6, 10, 10, 5, 1, 2, 10),
    "depthwise 5x5, strided": (4, 9, 8, 10, 10, 5, 2, 2, 10),
    "depthwise 5x5, strided, 3x4": (5, 3, 4, 10, 10, 5, 2, 2, 10),
    "depthwise 5x5, stride 3": (2, 8, 7, 10, 10, 5, 3, 0, 10),
    "depthwise 7x7": (2, 12, 9, 8, 8, 7, 1, 3, 8),
    "depthwise 7x7, in parts": (6, 27, 28, 64, 64, 7, 1, 3, 64),
    "depthwise 7x7, 3x3": (6, 3, 3, 8, 8, 7, 1, 3, 8),
    "depthwise 7x7, 2x1": (4, 2, 1, 8, 8, 7, 2, 3, 8),
    "depthwise, stride larger than the kernel": (2, 7, 8, 4, 4, 2, 3, 0, 4),
    "depthwise, wide padding": (2, 3, 3, 4, 4, 3, 1, 4, 4),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def plain(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int) -> jax.Array:
    pads, axes = [(padding, padding)] * 2, ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=axes, feature_group_count=groups
    )


def draw(name: str, dtype: str = "float64") -> tuple[jax.Array, jax.Array, tuple[int, int, int]]:
    n, h, w, c_in, c_out, k, stride, padding, groups = SHAPES[name]
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(n, h, w, c_in)), random.normal(size=(k, k, c_in // groups, c_out))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), (stride, padding, groups)


def value_and_gradients(convolve, x, kernel, geometry):
    """The output and both gradients of its sum weighted by fixed values that bfloat16 holds exactly."""

    @jax.jit
    def run(x, kernel):
        y, transpose = jax.vjp(lambda x, kernel: convolve(x, kernel, *geometry), x, kernel)
        weights = jnp.asarray(np.random.default_rng(1).integers(-8, 9, y.shape) / 8, y.dtype)
        return y, *transpose(weights)

    return run(x, kernel)


# float64 tells a wrong sum from a right one in every shape; what rounding does depends on the formulation only.
FORMULATIONS = ("plain 3x3", "winograd", "few pixels, 2x2", "strided 3x3, odd", "stem", "1x1", "depthwise 5x5, strided")
CASES = [(name, "float64") for name in SHAPES] + [(name, "float32") for name in FORMULATIONS]
CASES += [(name, "bfloat16") for name in FORMULATIONS if name != "winograd"]  # rounds outside of the formulations


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_values_and_gradients_are_the_plain_ones(name: str, dtype: str) -> None:
    x, kernel, geometry = draw(name, dtype)
    ours = value_and_gradients(conv2d, x, kernel, geometry)
    expected = value_and_gradients(plain, x.astype("float64"), kernel.astype("float64"), geometry)
    for what, a, b in zip(("value", "by the image", "by the kernel"), ours, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape, what
        np.testing.assert_allclose(a.astype("float64"), b, rtol=0, atol=TOLERANCES[dtype] * abs(b).max(), err_msg=what)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_named_winograd_runs_winograd(name: str) -> None:
    n, h, w, c_in, c_out, k, stride, padding, _ = SHAPES[name]
    pays = winograd.pays((n, h, w, c_in), (k, k, c_in, c_out), stride, padding)
    assert pays == name.startswith("winograd")


@pytest.mark.parametrize("name", ["wide, 2x2", *(name for name in SHAPES if name.startswith("few pixels"))])
def test_of_few_pixels_the_kernel_is_one_matrix(name: str) -> None:
    """And of more, nine: each a copy of its part."""
    x, kernel, (stride, padding, _) = draw(name)
    program = str(jax.make_jaxpr(lambda x, kernel: convolution.forward(x, kernel, stride, padding))(x, kernel))
    assert program.count("dot_general") == (1 if name.startswith("few pixels") else 9)


def test_the_same_bits_every_time() -> None:
    x, kernel, geometry = draw("winograd in parts", "float32")
    by_kernel = jax.jit(jax.grad(lambda kernel: jnp.tanh(conv2d(x, kernel, *geometry)).sum()))
    assert (by_kernel(kernel) == by_kernel(kernel)).all()


@pytest.mark.parametrize("name", ["tiny 3x3", "depthwise 3x3"])
def test_inside_scan_and_checkpoint(name: str) -> None:
    x, kernel, geometry = draw(name)

    def loss(convolve):
        layer = jax.checkpoint(lambda x, kernel: (jnp.tanh(convolve(x, kernel, *geometry) / 30), None))
        return lambda kernels: lax.scan(layer, x, kernels)[0].sum()

    kernels = jnp.stack([kernel, kernel[::-1]])
    ours, expected = (jax.jit(jax.grad(loss(convolve)))(kernels) for convolve in (conv2d, plain))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12 * abs(expected).max())


@pytest.mark.parametrize("name", ["depthwise 3x3", "groups of 20, strided"])
def test_exported_for_a_batch_of_any_size(name: str) -> None:
    x, kernel, geometry = draw(name)
    any_size = jax.ShapeDtypeStruct((jax.export.symbolic_shape("n")[0], *x.shape[1:]), x.dtype)
    weigh = jax.value_and_grad(lambda x, kernel: (conv2d(x, kernel, *geometry) ** 2).sum(), (0, 1))
    exported = jax.export.export(jax.jit(weigh), platforms=["cpu", "cuda"])(any_size, kernel)
    for ours, expected in zip(jax.tree.leaves(exported.call(x, kernel)), jax.tree.leaves(jax.jit(weigh)(x, kernel))):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12 * abs(expected).max())


@pytest.mark.parametrize("name", ["winograd, 4x4", "wide, fewer channels out"])
def test_second_derivatives_are_right_or_refused(name: str) -> None:
    x, kernel, geometry = draw(name)

    def curvature(convolve):
        slope = jax.grad(lambda kernel: jnp.tanh(convolve(x, kernel, *geometry)).sum())
        return jax.jit(jax.grad(lambda kernel: (slope(kernel) ** 2).sum()))(kernel)

    np.testing.assert_allclose(curvature(conv2d), curvature(plain), rtol=1e-9, atol=1e-9)
    with pytest.raises(TypeError, match="forward-mode .* custom_vjp"):
        jax.jvp(lambda x: conv2d(x, kernel, *geometry), (x,), (x,))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", ["winograd", "strided 3x3", "stem", "1x1", "groups of 4", "groups of 20, strided"])
def test_an_accelerator_gets_the_plain_convolution(name: str, platform: str) -> None:
    x, kernel, geometry = draw(name, "float32")

    def convolutions(convolve) -> tuple[int, int]:
        step = jax.jit(lambda x, kernel: value_and_gradients(convolve, x, kernel, geometry))
        text = step.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")

    assert convolutions(conv2d) == convolutions(plain) == (3, 0)


@pytest.mark.parametrize(
    ("x", "kernel", "padding", "groups", "message"),
    [
        ((2, 8, 8, 3), (3, 3, 4, 8), 1, 1, "does not fit"),
        ((2, 8, 8, 4), (3, 3, 4, 8), 1, 2, "does not fit"),
        ((2, 8, 8, 4), (3, 1, 4, 8), 1, 1, "does not fit"),
        ((2, 2, 8, 4), (3, 3, 4, 8), 0, 1, "larger than"),
    ],
)
def test_shapes_that_do_not_fit(x, kernel, padding: int, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv2d(jnp.zeros(x), jnp.zeros(kernel), 1, padding, groups)


@pytest.mark.parametrize("shape", [(2, 8, 8, 4), (2, 7, 9, 4), (1, 1, 1, 3), (1, 2, 5, 3)])
def test_max_pool_gives_the_gradient_to_the_first_of_equals(shape: tuple[int, ...]) -> None:
    """Three values only, so that most windows hold ties; torch and XLA's select_and_scatter both take the first."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, shape), "float64")
    plain_pool = lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for ours, expected in zip(
        *(value_and_gradients(lambda x, _: pool(x), x, x, ()) for pool in (max_pool, plain_pool)), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("k", "padding"), [(3, 1), (2, 0)])
@pytest.mark.parametrize("shape", [(2, 8, 8, 4), (2, 7, 9, 4), (1, 2, 5, 3)])
def test_each_form_of_max_pools_gradient_is_xlas(shape: tuple[int, ...], k: int, padding: int) -> None:
    """A GPU's, which no CPU takes of its own, too; whole numbers, so that no order of adding shows."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.integers(0, 3, shape), "float32")
    plain, pull = jax.vjp(lambda x: pooling._max_pool_plain(x, k, padding), x)
    dy = jnp.asarray(random.integers(-9, 9, plain.shape), "float32")
    np.testing.assert_array_equal(pooling._first_maximum(x, k, padding)[0], plain)
    for form in (pooling._gradient_by_pixels, pooling._gradient_by_taps):
        np.testing.assert_array_equal(form(x, dy, k, padding), pull(dy)[0])


def test_max_pool_takes_on_each_platform_what_is_fast_there() -> None:
    """XLA's window on TPUs, slices elsewhere; the barrier between them is the CPU's."""
    step = jax.jit(jax.value_and_grad(lambda x: max_pool(x).sum())).trace(jnp.zeros((2, 8, 8, 4)))
    for platform, window, barrier in (("cpu", False, True), ("cuda", False, False), ("tpu", True, False)):
        text = step.lower(lowering_platforms=(platform,)).as_text()
        assert ("select_and_scatter" in text, "optimization_barrier" in text) == (window, barrier), platform


def test_relu_at_the_end_of_a_block_is_relu() -> None:
    """None passes at 0, as in torch; the gradient of the gradient; and the barrier is none of the CPU's."""
    x = jnp.asarray([-2.0, -0.0, 0.0, 1e-40, 3.0])
    for ours, expected in zip(jax.vjp(relu, x)[1](x + 5), jax.vjp(nn.relu, x)[1](x + 5), strict=True):
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(relu(x), nn.relu(x))
    twice = lambda function: jax.grad(lambda x: jnp.square(jax.grad(lambda x: (function(x) ** 3).sum())(x)).sum())(x)
    np.testing.assert_array_equal(twice(relu), twice(nn.relu))
    step = jax.jit(jax.value_and_grad(lambda x: relu(x).sum())).trace(x)
    for platform in ("cpu", "cuda", "tpu"):
        text = step.lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" in text) == (platform != "cpu"), platform


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jaxsft.models import convolution
from jaxsft.models.convolution import conv2d
from jaxsft.models.blocks import relu
from jaxsft.models.matmul import matmul
from jaxsft.models.pooling import max_pool
jax.config.update("jax_enable_x64", True)
random = np.random.default_rng(0)
x, kernel = random.normal(size=(8, 8, 14, 14, 128))[:, 0], random.normal(size=(3, 3, 128, 128))
x = np.tile(x, (6, 1, 1, 1))  # 24 images a device: in two parts, through the scan as well
def loss(kernel, x):
    y = conv2d(x, kernel, 1, 1)
    y = matmul(conv2d(y[..., :32], kernel[:, :, :1, :32], 1, 1, 32), kernel[0, 0, :32, :48])
    return jnp.tanh(relu(max_pool(y)) / 300).sum()
expected = jax.jit(jax.grad(loss))(kernel, x)
def step(kernel, x):
    gradient = jax.grad(loss)(kernel, x)
    return gradient if implicit else jax.lax.psum(gradient, "batch")
mesh = jax.sharding.Mesh(jax.devices(), ("batch",))
for name in ("pmap", "shard_map", "shard_map, check_vma"):
    implicit = name.endswith("check_vma")  # there the gradient of a shared argument is summed by autodiff
    if name == "pmap":
        run = jax.pmap(step, axis_name="batch", in_axes=(None, 0), out_axes=None)
        actual = run(kernel, x.reshape(2, -1, *x.shape[1:]))
    else:
        specs = dict(in_specs=(P(), P("batch")), out_specs=P(), check_vma=implicit)
        places = [jax.NamedSharding(mesh, spec) for spec in specs["in_specs"]]
        arguments = [jax.device_put(value, place) for value, place in zip((kernel, x), places)]
        actual = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(*arguments)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * abs(expected).max(), err_msg=name)
"""


def test_on_two_devices(run) -> None:
    """pmap and shard_map, under both settings of check_vma; in a process of its own: devices are made at start."""
    done = run("-c", DEVICES, devices=2)
    assert done.returncode == 0, done.stderr[-3000:]
