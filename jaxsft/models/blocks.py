"""What several families are built of: activations, convolution-norm-activation, squeeze and excitation.

Activations are torch's, with its gradients: at the bends of relu6 none passes, as nowhere in torch's own backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxsft.models.layers import BatchNorm, Conv, Initializer, at_least_float32, kaiming_normal_fan_out, pointwise

Activation = Callable[[jax.Array], jax.Array]
gelu: Activation = partial(nn.gelu, approximate=False)  # Flax's default is the tanh form, torch's the exact one


def relu6(x: jax.Array) -> jax.Array:
    """`torch.nn.ReLU6`."""
    return lax.clamp(jnp.zeros((), x.dtype), x, jnp.full((), 6, x.dtype))


def hard_sigmoid(x: jax.Array) -> jax.Array:
    """`torch.nn.Hardsigmoid`: relu6(x + 3) / 6."""
    return relu6(x + 3) / 6


def hard_swish(x: jax.Array) -> jax.Array:
    """`torch.nn.Hardswish` (arXiv:1905.02244): x * relu6(x + 3) / 6."""
    return x * hard_sigmoid(x)


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
