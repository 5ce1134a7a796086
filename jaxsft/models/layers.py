"""Convolution, batch norm, pooling and the head with torch's numerics: the only place for them.

Images are NHWC, kernels HWIO; every layer computes in the dtype of its input (float32, float64 or bfloat16) and keeps
its parameters in `param_dtype`. What torch does differently from Flax's defaults, and would be lost by using those:
symmetric padding at stride 2, max-pooling padded by -inf, a running variance that is unbiased, two-pass batch
statistics, and U(+-1/sqrt(fan_in)) for a fresh linear layer.
"""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxsft.models.convolution import conv2d
from jaxsft.models.normalization import batch_norm
from jaxsft.models.pointwise import conv_norm

# torch.nn.init.kaiming_normal_(mode="fan_out", nonlinearity="relu"), which torchvision applies to every convolution.
kaiming_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def torch_linear_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, *, fan_in: int) -> jax.Array:
    """Draw U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what `torch.nn.Linear.reset_parameters` gives weight and bias."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Conv(nn.Module):
    """`torch.nn.Conv2d(bias=False)`: square kernel, one stride, padding of kernel_size // 2 on all four sides.

    Takes [N, H, W, C_in] and returns [N, H', W', features], H' = (H + 2 * (k // 2) - k) // stride + 1.
    """

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, only_kernel: bool = False) -> jax.Array:
        """The convolution of `x`; or the kernel that it would take, for who does more than this."""
        k = self.kernel_size
        shape = (k, k, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", kaiming_normal_fan_out, shape, self.param_dtype)
        kernel = kernel.astype(x.dtype)
        # Explicit padding: "SAME" pads (0, 1) at stride 2 where torch pads (1, 1).
        return kernel if only_kernel else conv2d(x, kernel, self.stride, k // 2, self.groups)


class OneValueError(ValueError):
    """Batch norm is to train on a single value a channel."""


class BatchNorm(nn.Module):
    """`torch.nn.BatchNorm2d` over N, H and W of [N, H, W, C].

    In training it normalises by the batch's mean and *biased* variance and moves the running values by `momentum`
    (torch's sense: the weight of the new value) towards the mean and the *unbiased* variance, n / (n - 1).
    In evaluation, and in training where a pattern of `frozen` is found in this layer's path, the running values
    are used and nothing is updated.

    Collections: params/scale, params/bias, batch_stats/mean, batch_stats/var of shape [C], and batch_stats/count, the
    int32 scalar that torch calls num_batches_tracked. Statistics are taken in float32 at least.

    Raises:
      OneValueError: in training, when each channel has a single value, whose variance is undefined (torch refuses it
        too).
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    axis_name: str | None = None  # of the devices whose statistics are shared; None: this device's alone
    frozen: tuple[str, ...] = ()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, kernel: jax.Array | None = None) -> jax.Array:
        """`x` normalised; with the `kernel` [1, 1, C', C] of a convolution what that makes of `x` [N, H, W, C']."""
        channels = (x.shape[-1] if kernel is None else kernel.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)

        dtype = jnp.promote_types(x.dtype, jnp.float32)
        scale, bias = scale.astype(dtype), bias.astype(dtype)
        if not train or is_frozen(self.path, self.frozen):
            factor = lax.rsqrt(running_var.value.astype(dtype) + self.epsilon) * scale
            return ((x.astype(dtype) - running_mean.value.astype(dtype)) * factor + bias).astype(x.dtype)
        axis_name = None if self.is_initializing() else self.axis_name
        if kernel is None:
            y, mean, var = batch_norm(x, scale, bias, self.epsilon, axis_name)
        else:
            y, mean, var = conv_norm(x, kernel, scale, bias, self.epsilon)
        size = y.size // y.shape[-1] * (1 if axis_name is None else lax.axis_size(axis_name))
        if size == 1:
            raise OneValueError(f"{'/'.join(self.path)}: one value per channel when training, input {x.shape}")
        if not self.is_initializing():
            running_mean.value = self._move(running_mean.value, mean)
            running_var.value = self._move(running_var.value, var * (size / (size - 1)))
            count.value = count.value + 1
        return y

    def may_fuse(self, x: jax.Array, train: bool) -> bool:
        """Whether a call with a kernel would do the same: in training, by this device's statistics, in bfloat16."""
        own = self.axis_name is None and not is_frozen(self.path, self.frozen)
        return train and own and x.dtype == jnp.bfloat16

    def _move(self, old: jax.Array, new: jax.Array) -> jax.Array:
        return ((1 - self.momentum) * old + self.momentum * new).astype(old.dtype)


def pointwise(conv: Conv, norm: BatchNorm, x: jax.Array, train: bool) -> jax.Array:
    """norm(conv(x)) of a 1x1 convolution, as one operation where that may be and pays: not at stride 2."""
    if conv.stride == 1 and norm.may_fuse(x, train):
        return norm(x, train, conv(x, only_kernel=True))
    return norm(conv(x), train)


def is_frozen(path: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether a pattern is found in the path of a module or parameter, written `layer1_0/bn1` (+ `/scale`)."""
    name = "/".join(path)
    return any(re.search(pattern, name) for pattern in patterns)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """`torch.nn.MaxPool2d(3, stride=2, padding=1)` on [N, H, W, C]: the border counts as -inf, not as zero.

    Of equal values in a window the first in row-major order gets the gradient, as in torch and in XLA. XLA's own
    operation runs on GPU and TPU; on the CPU its two loops took a tenth of a train step, and are sums of slices here.
    Reverse mode only.
    """
    return lax.platform_dependent(x, cpu=lambda x: _first_maximum(x)[0], default=_max_pool_plain)


def _max_pool_plain(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def _first_maximum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maximum of each window and which of its nine taps, counted row by row, holds it first."""
    n, h, w, c = x.shape
    height, width = (h + 1) // 2, (w + 1) // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    x = lax.optimization_barrier(x)  # else every slice pads anew
    best, first = jnp.full((n, height, width, c), -jnp.inf, x.dtype), jnp.zeros((n, height, width, c), jnp.int8)
    for tap in range(9):
        i, j = divmod(tap, 3)
        value = lax.slice(x, (0, i, j, 0), (n, i + 2 * height - 1, j + 2 * width - 1, c), (1, 2, 2, 1))
        first = jnp.where(value > best, jnp.int8(tap), first)
        best = jnp.maximum(best, value)
    return best, first


def _max_pool_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Each of the four pixels of a 2x2 cell collects from the one, two or four windows that see it."""
    n, h, w, c = x.shape
    height, width = dy.shape[1:3]
    after = ((0, 0), (0, 1), (0, 1), (0, 0))
    dy, first = lax.optimization_barrier((jnp.pad(dy, after), jnp.pad(_first_maximum(x)[1], after)))
    # Of the pixels 2u: tap 1 of window u. Of 2u + 1: tap 2 of window u and tap 0 of window u + 1.
    taps = (((1, 0),), ((2, 0), (0, 1)))

    def collect(row: int, column: int) -> jax.Array:
        total = jnp.zeros((n, height, width, c), dy.dtype)
        for i, down in taps[row]:
            for j, right in taps[column]:
                window = (slice(None), slice(down, down + height), slice(right, right + width))
                total += jnp.where(first[window] == 3 * i + j, dy[window], 0)
        return total

    dx = jnp.stack([jnp.stack([collect(row, column) for column in (0, 1)], 3) for row in (0, 1)], 2)
    return dx.reshape(n, 2 * height, 2 * width, c)[:, :h, :w]


def _max_pool_bwd(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    plain = lambda x, dy: jax.vjp(_max_pool_plain, x)[1](dy)[0]
    return (lax.platform_dependent(x, dy, cpu=_max_pool_gradient, default=plain),)


max_pool.defvjp(lambda x: (max_pool(x), x), _max_pool_bwd)


def global_average_pool(x: jax.Array) -> jax.Array:
    """`AdaptiveAvgPool2d(1)` and `flatten`: [N, H, W, C] to [N, C], in float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))


class Linear(nn.Module):
    """`torch.nn.Linear` from [N, C] to [N, features]; the kernel is stored [C, features], torch's transposed.

    `weight_init` is "torch" (uniform in +-1/sqrt(C), as a fresh torch layer) or "zeros" (the logits start at 0).
    """

    features: int
    weight_init: str = "torch"
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fan_in = x.shape[-1]

        def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            if self.weight_init == "zeros":
                return jnp.zeros(shape, dtype)
            return torch_linear_uniform(key, shape, dtype, fan_in=fan_in)

        kernel = self.param("kernel", draw, (fan_in, self.features), self.param_dtype)
        bias = self.param("bias", draw, (self.features,), self.param_dtype)
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)
