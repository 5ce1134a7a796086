"""What several families are built of: activations, convolution-norm-activation, squeeze and excitation.

Activations are torch's, with its gradients: at the bends of relu6 none passes, as nowhere in torch's own backward pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxsft.models import stem
from jaxsft.models.layers import BatchNorm, Conv, Initializer, at_least_float32, kaiming_normal_fan_out, pointwise
from jaxsft.models.platform import by_platform
from jaxsft.models.pooling import max_pool
from jaxsft.models.stochastic import Keys, StochasticDepth

Activation = Callable[[jax.Array], jax.Array]
SQRT_HALF, SQRT_2_PI = math.sqrt(0.5), math.sqrt(2 * math.pi)


def relu6(x: jax.Array) -> jax.Array:
    """`torch.nn.ReLU6`."""
    return lax.clamp(jnp.zeros((), x.dtype), x, jnp.full((), 6, x.dtype))


def hard_sigmoid(x: jax.Array) -> jax.Array:
    """`torch.nn.Hardsigmoid`: relu6(x + 3) / 6."""
    return relu6(x + 3) / 6


def hard_swish(x: jax.Array) -> jax.Array:
    """`torch.nn.Hardswish` (arXiv:1905.02244): x * relu6(x + 3) / 6."""
    return x * hard_sigmoid(x)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """`torch.nn.ReLU`, whose gradient is masked by what it gives instead of by what it takes. Reverse mode only.

    At the end of a block that is a sum, which an accelerator then need not keep: 3 % fewer bytes of a ResNet-50's step
    on an H100, and 1.6 GB less memory. Without the barrier XLA asks the sum again.
    """
    return by_platform(x, cpu=nn.relu, default=lambda x: lax.optimization_barrier(nn.relu(x)))


relu.defvjp(lambda x: (lambda y: (y, y))(relu(x)), lambda y, dy: (jnp.where(y > 0, dy, jnp.zeros_like(dy)),))


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """`torch.nn.GELU` (arXiv:1606.08415), the exact one: x * (1 + erf(x / sqrt(2))) / 2. Reverse mode only.

    It is computed in float32 at least. Flax's default is the tanh form, and its exact one asks erfc, with which it took
    35 ms instead of 15 for ten million values on one core. The gradient keeps `x` alone, and computes erf anew: in a
    ConvNeXt's step on an H100, bfloat16, a tenth of the bytes and 2 of 5.7 GB of memory.
    """
    wide = at_least_float32(x)
    return (wide * _normal(wide)).astype(x.dtype)


def _gelu_bwd(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    wide = at_least_float32(lax.optimization_barrier(x))  # else XLA keeps the forward pass's erf
    slope = _normal(wide) + wide * jnp.exp(-0.5 * jnp.square(wide)) / SQRT_2_PI
    return ((dy.astype(wide.dtype) * slope).astype(dy.dtype),)


def _normal(x: jax.Array) -> jax.Array:
    """The standard normal distribution function."""
    return 0.5 * (1 + lax.erf(x * SQRT_HALF))


gelu.defvjp(lambda x: (gelu(x), x), _gelu_bwd)


class ReLU(nn.Module):
    """`torch.nn.ReLU` as a module, where what it gives is to be found by torch's name of it."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(x)


def norm_relu_pool(norm: BatchNorm, x: jax.Array, train: bool) -> jax.Array:
    """max_pool(relu(norm(x))), as a stem ends; as one operation where that may be and pays."""
    if norm.may_fuse(x, train):
        return norm(x, train, stem.norm_relu_pool)
    return max_pool(nn.relu(norm(x, train)))


class ConvNorm(nn.Module):
    """`torchvision.ops.Conv2dNormActivation` with batch norm: modules "0", the convolution without bias, and "1".

    Takes [N, H, W, C_in] and returns [N, H / stride, W / stride, features], rounded up.
    """

    features: int
    kernel_size: int
    norm: Callable[..., BatchNorm]
    stride: int = 1
    groups: int = 1
    activation: Activation | None = None
    kernel_init: Initializer = kaiming_normal_fan_out
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.groups,
            kernel_init=self.kernel_init,
            param_dtype=self.param_dtype,
            name="0",
        )
        norm = self.norm(name="1")
        y = pointwise(conv, norm, x, train) if self.kernel_size == 1 else norm(conv(x), train)
        return self.activation(y) if self.activation else y


class SqueezeExcitation(nn.Module):
    """`torchvision.ops.SqueezeExcitation` (arXiv:1709.01507): channels scaled by a gate of their means over the image.

    Modules "fc1" and "fc2", 1x1 convolutions with bias. Takes and returns [N, H, W, C].
    """

    squeeze: int  # channels between the two
    activation: Activation = nn.relu
    gate: Activation = nn.sigmoid
    kernel_init: Initializer = kaiming_normal_fan_out
    bias_init: str | Initializer = nn.initializers.zeros  # as a `Conv`'s
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(
            Conv, kernel_size=1, kernel_init=self.kernel_init, bias_init=self.bias_init, param_dtype=self.param_dtype
        )
        mean = at_least_float32(x).mean((1, 2), keepdims=True).astype(x.dtype)
        y = self.activation(conv(self.squeeze, name="fc1")(mean))
        return x * self.gate(conv(x.shape[-1], name="fc2")(y))


def to_eights(channels: float) -> int:
    """The multiple of 8 next to `channels`, halves upwards, at least 8; the one above where it lacks over a tenth."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


class InvertedResidual(nn.Module):
    """MobileNetV3's and EfficientNet's block: widen, depthwise, squeeze and excite, narrow; a shortcut where it can be.

    Takes [N, H, W, C] and returns [N, H / stride, W / stride, features], rounded up. Modules "block.0", "block.1", ...
    count those that there are; "stochastic_depth", where there is a rate, comes before the shortcut is added.
    """

    features: int
    expanded: int  # channels of the depthwise convolution; if the input has as many nothing widens
    kernel_size: int
    norm: Callable[..., BatchNorm]
    activation: Activation
    stride: int = 1
    squeeze: Callable[..., SqueezeExcitation] | None = None
    rate: float | None = None  # of stochastic depth; None: the block has none
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        conv = partial(ConvNorm, norm=self.norm, param_dtype=self.param_dtype)
        names = (f"block.{number}" for number in itertools.count())
        y = x
        if self.expanded != x.shape[-1]:
            y = conv(self.expanded, 1, activation=self.activation, name=next(names))(y, train)
        depthwise = partial(conv, self.expanded, self.kernel_size, stride=self.stride, groups=self.expanded)
        y = depthwise(activation=self.activation, name=next(names))(y, train)
        if self.squeeze is not None:
            y = self.squeeze(param_dtype=self.param_dtype, name=next(names))(y)
        y = conv(self.features, 1, name=next(names))(y, train)
        if self.stride != 1 or x.shape[-1] != self.features:
            return y
        if self.rate is not None:
            y = StochasticDepth(self.rate, name="stochastic_depth")(y, keys)
        return x + y
