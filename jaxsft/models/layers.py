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
    def __call__(self, x: jax.Array) -> jax.Array:
        k = self.kernel_size
        shape = (k, k, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", kaiming_normal_fan_out, shape, self.param_dtype)
        # Explicit padding: "SAME" pads (0, 1) at stride 2 where torch pads (1, 1).
        return conv2d(x, kernel.astype(x.dtype), self.stride, k // 2, self.groups)


class BatchNorm(nn.Module):
    """`torch.nn.BatchNorm2d` over N, H and W of [N, H, W, C].

    In training it normalises by the batch's mean and *biased* variance and moves the running values by `momentum`
    (torch's sense: the weight of the new value) towards the mean and the *unbiased* variance, n / (n - 1).
    In evaluation, and in training where a pattern of `frozen` is found in this layer's path, the running values
    are used and nothing is updated.

    Collections: params/scale, params/bias, batch_stats/mean, batch_stats/var of shape [C], and batch_stats/count, the
    int32 scalar that torch calls num_batches_tracked. Statistics are taken in float32 at least.

    Raises:
      ValueError: in training, when each channel has a single value (torch refuses it too: its variance is undefined).
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    axis_name: str | None = None  # of the devices whose statistics are shared; None: this device's alone
    frozen: tuple[str, ...] = ()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)

        dtype = jnp.promote_types(x.dtype, jnp.float32)
        if not train or is_frozen(self.path, self.frozen):
            mean, var = running_mean.value.astype(dtype), running_var.value.astype(dtype)
        else:
            axis_name = None if self.is_initializing() else self.axis_name
            mean, var, size = batch_statistics(x, axis_name)
            if size == 1:
                raise ValueError(f"{'/'.join(self.path)}: one value per channel when training, input {x.shape}")
            if not self.is_initializing():
                move = lambda old, new: ((1 - self.momentum) * old + self.momentum * new).astype(old.dtype)
                running_mean.value = move(running_mean.value, mean)
                running_var.value = move(running_var.value, var * (size / (size - 1)))
                count.value = count.value + 1
        factor = lax.rsqrt(var + self.epsilon) * scale.astype(dtype)
        # Centre first: x * factor - mean * factor loses every digit when the mean is large against the deviation.
        return ((x.astype(dtype) - mean) * factor + bias.astype(dtype)).astype(x.dtype)


def batch_statistics(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array, int]:
    """Mean and biased variance of each channel of [N, H, W, C] in two passes, and how many values went into each.

    E[x^2] - E[x]^2 would save a pass, but at mean 100 and deviation 0.01 it leaves no correct digit in float32.
    With `axis_name` the values of all devices of that axis count, which must hold equally many each.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    size = x.size // x.shape[-1]
    mean = x.mean((0, 1, 2))
    if axis_name is not None:
        mean = lax.pmean(mean, axis_name)
        size *= lax.axis_size(axis_name)
    var = jnp.square(x - mean).mean((0, 1, 2))
    if axis_name is not None:
        var = lax.pmean(var, axis_name)
    return mean, var, size


def is_frozen(path: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether a pattern is found in the path of a module or parameter, written `layer1_0/bn1` (+ `/scale`)."""
    name = "/".join(path)
    return any(re.search(pattern, name) for pattern in patterns)


def max_pool(x: jax.Array) -> jax.Array:
    """`torch.nn.MaxPool2d(3, stride=2, padding=1)` on [N, H, W, C]: the border counts as -inf, not as zero."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


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
