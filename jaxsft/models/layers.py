"""Convolution, norms and linear layers with torch's numerics: the only place for them.

Images are NHWC, kernels HWIO; every layer computes in the dtype of its input (float32, float64 or bfloat16) and keeps
its parameters in `param_dtype`. What torch does differently from Flax's defaults, and would be lost by using those:
symmetric padding at stride 2, a running variance that is unbiased, two-pass statistics, and U(+-1/sqrt(fan_in)) for a
fresh linear layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxsft.models.convolution import conv2d
from jaxsft.models.matmul import matmul
from jaxsft.models.normalization import batch_norm
from jaxsft.models.pointwise import conv_norm

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
# What `normalization.batch_norm` takes and returns: x, scale, bias, epsilon, axis_name -> y, mean, var.
NormForm = Callable[[jax.Array, jax.Array, jax.Array, float, str | None], tuple[jax.Array, jax.Array, jax.Array]]

# torch.nn.init.kaiming_normal_(mode="fan_out", nonlinearity="relu"), which most of torchvision's convolutions begin as.
kaiming_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def torch_linear_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, *, fan_in: int) -> jax.Array:
    """Draw U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what `torch.nn.Linear.reset_parameters` gives weight and bias."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x`, where it is narrower, as float32: what pooling and the head compute in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Conv(nn.Module):
    """`torch.nn.Conv2d`: square kernel, one stride, `padding` (None: kernel_size // 2) of zeros on all four sides.

    Takes [N, H, W, C_in] and returns [N, H', W', features], H' = (H + 2 * padding - k) // stride + 1. It has a bias
    where `bias_init` is given, with most of torchvision's zeros; "torch" draws it as a fresh torch layer does.
    """

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    padding: int | None = None
    kernel_init: Initializer = kaiming_normal_fan_out
    bias_init: str | Initializer | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, only_kernel: bool = False) -> jax.Array:
        """The convolution of `x`; or the kernel that it would take, for who does more than this."""
        k = self.kernel_size
        shape = (k, k, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        kernel = kernel.astype(x.dtype)
        # Explicit padding: "SAME" pads (0, 1) at stride 2 where torch pads (1, 1).
        if only_kernel:
            return kernel
        y = conv2d(x, kernel, self.stride, k // 2 if self.padding is None else self.padding, self.groups)
        if self.bias_init is None:
            return y
        bias_init = self.bias_init
        if isinstance(bias_init, str):
            bias_init = partial(torch_linear_uniform, fan_in=math.prod(shape[:3]))
        return y + self.param("bias", bias_init, (self.features,), self.param_dtype).astype(x.dtype)


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
    def __call__(
        self, x: jax.Array, train: bool, form: NormForm | None = None, features: int | None = None
    ) -> jax.Array:
        """`x` normalised.

        Where it `may_fuse`, `form` may do more in one: it takes and returns what `batch_norm` does, for `features`
        channels.
        """
        channels = (features or x.shape[-1],)
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
        y, mean, var = (form or batch_norm)(x, scale, bias, self.epsilon, axis_name)
        size = x.size // x.shape[-1] * (1 if axis_name is None else lax.axis_size(axis_name))
        if size == 1:
            raise OneValueError(f"{'/'.join(self.path)}: one value per channel when training, input {x.shape}")
        if not self.is_initializing():
            running_mean.value = self._move(running_mean.value, mean)
            running_var.value = self._move(running_var.value, var * (size / (size - 1)))
            count.value = count.value + 1
        return y

    def may_fuse(self, x: jax.Array, train: bool) -> bool:
        """Whether another form of it would do: in training, and in bfloat16, whose rounding is coarser than what one
        form differs from the other by."""
        return train and not is_frozen(self.path, self.frozen) and x.dtype == jnp.bfloat16

    def _move(self, old: jax.Array, new: jax.Array) -> jax.Array:
        return ((1 - self.momentum) * old + self.momentum * new).astype(old.dtype)


def pointwise(conv: Conv, norm: BatchNorm, x: jax.Array, train: bool) -> jax.Array:
    """norm(conv(x)) of a 1x1 convolution, as one operation where that may be and pays.

    Not where x is wider than what comes of it: the products of all its channels then cost more than is saved, in a
    MobileNetV2 a tenth of the bytes and half of the FLOPs.
    """
    if x.shape[-1] > conv.features or norm.axis_name is not None or not norm.may_fuse(x, train):
        return norm(conv(x), train)
    x = x[:, :: conv.stride, :: conv.stride]  # the pixels that it sees
    kernel = conv(x, only_kernel=True)
    own = lambda x, scale, bias, epsilon, _: conv_norm(x, kernel, scale, bias, epsilon)  # this device's statistics
    return norm(x, train, own, conv.features)


def is_frozen(path: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether a pattern is found in the path of a module or parameter, written `layer1_0/bn1` (+ `/scale`)."""
    name = "/".join(path)
    return any(re.search(pattern, name) for pattern in patterns)


class LayerNorm(nn.Module):
    """`torch.nn.LayerNorm` over the last axis of [..., C], by the biased variance, in float32 at least.

    Ba et al. 2016 (arXiv:1607.06450). torchvision's LayerNorm2d is the same, for its images lie [N, C, H, W].
    """

    epsilon: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        y = at_least_float32(x)
        y = y - y.mean(-1, keepdims=True)  # two passes: batch_statistics in normalization.py says why
        y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * scale.astype(y.dtype) + bias.astype(y.dtype)).astype(x.dtype)


class Linear(nn.Module):
    """`torch.nn.Linear` from [..., C] to [..., features]; the kernel is stored [C, features], torch's transposed.

    `kernel_init` is an initializer, or "torch" (uniform in +-1/sqrt(C), as a fresh torch layer, the bias too), or
    "zeros" (all of it: the logits start at 0). `bias_init` None: zeros beside an initializer of the kernel.
    """

    features: int
    kernel_init: str | Initializer = "torch"
    bias_init: Initializer | None = None
    use_bias: bool = True
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = self.kernel_init
        bias_init = self.bias_init or nn.initializers.zeros
        if kernel_init == "zeros":
            kernel_init = nn.initializers.zeros
        elif isinstance(kernel_init, str):
            kernel_init = partial(torch_linear_uniform, fan_in=x.shape[-1])
            bias_init = self.bias_init or kernel_init
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), self.param_dtype)
        y = matmul(x, kernel.astype(x.dtype))
        if not self.use_bias:
            return y
        return y + self.param("bias", bias_init, (self.features,), self.param_dtype).astype(x.dtype)
