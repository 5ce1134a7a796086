"""torchvision's four DenseNets in Flax Linen.

Huang et al. 2016 (arXiv:1608.06993), the paper's DenseNet-BC. A layer is given what came before its block and what
every layer before it in the block has made, side by side, and adds `growth` channels. Batch norm and ReLU come before
the convolution, so that each layer norms all those channels anew. torchvision's dropout is off unless asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.models.blocks import norm_relu_pool
from jaxsft.models.family import Family, ImageSizeError
from jaxsft.models.layers import BatchNorm, Conv, Linear, pointwise
from jaxsft.models.pooling import average_pool, global_average_pool
from jaxsft.models.stochastic import Dropout, Keys

HEAD = "classifier"
BOTTLENECK = 4  # channels between a layer's two convolutions, in units of its growth

kaiming_normal_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class DenseLayer(nn.Module):
    """1x1 and 3x3 convolutions, each after batch norm and ReLU: [N, H, W, .] to [N, H, W, growth], the new channels.

    It is given the block's input and what each layer before it made, and lays them side by side itself: with remat
    those are what is kept, each once for all layers that see it (Pleiss et al. 2017, arXiv:1707.06990). To hand on one
    array that grows instead moves as many bytes, and XLA compiled a block of 24 layers in 152 s instead of 38.
    """

    growth: int
    dropout: float
    conv: Any  # partial(Conv, ...)
    norm: Any  # partial(BatchNorm, ...)

    @nn.compact
    def __call__(self, features: tuple[jax.Array, ...], train: bool, keys: Keys = None) -> jax.Array:
        x = nn.relu(self.norm(name="norm1")(side_by_side(features), train))
        conv1, norm2 = self.conv(BOTTLENECK * self.growth, 1, name="conv1"), self.norm(name="norm2")
        x = nn.relu(pointwise(conv1, norm2, x, train))
        return Dropout(self.dropout, name="dropout")(self.conv(self.growth, 3, name="conv2")(x), keys)


class DenseBlock(nn.Module):
    """`layers` dense layers: [N, H, W, C] to [N, H, W, C + layers * growth], the oldest channels first."""

    layers: int
    growth: int
    dropout: float
    conv: Any  # partial(Conv, ...)
    norm: Any  # partial(BatchNorm, ...)
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        layer = nn.remat(DenseLayer, static_argnums=(2,)) if self.remat else DenseLayer
        features: tuple[jax.Array, ...] = (x,)
        for index in range(1, self.layers + 1):
            new = layer(self.growth, self.dropout, self.conv, self.norm, name=f"denselayer{index}")
            features = (*features, new(features, train, keys))
        return side_by_side(features)


class Transition(nn.Module):
    """Between blocks: half the channels and half the side, rounded down, [N, H, W, C] to [N, H / 2, W / 2, C / 2]."""

    conv: Any  # partial(Conv, ...)
    norm: Any  # partial(BatchNorm, ...)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(self.norm(name="norm")(x, train))
        return average_pool(self.conv(x.shape[-1] // 2, 1, name="conv")(y))


def side_by_side(features: tuple[jax.Array, ...]) -> jax.Array:
    """One array of the channels of all."""
    return features[0] if len(features) == 1 else jnp.concatenate(features, -1)


class DenseNet(nn.Module):
    """A DenseNet from normalised images [N, H, W, 3] of 29 px and more to logits [N, num_classes].

    With `train` batch norm takes the batch's statistics, and with `keys` dropout draws. Logits and pooling are float32
    at least whatever `dtype` (float32, float64, bfloat16) the body computes in.

    Raises:
      ImageSizeError: nothing of the image would be left.
    """

    blocks: tuple[int, ...]  # layers of each
    growth: int = 32
    width: int = 64  # channels of the stem
    num_classes: int = 1000
    dropout: float = 0.0
    head_init: str = "torch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None  # share batch-norm statistics over this axis of devices
    frozen: tuple[str, ...] = ()  # patterns of paths whose batch norm stays on running statistics
    remat: bool = False  # keep only what each layer adds for the backward pass, and compute the layer again there

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        # The stem's two halvings round up, the transitions' down.
        if min(x.shape[1:3]) < (least := 2 ** (len(self.blocks) + 1) - 3):
            raise ImageSizeError(f"it must be {least} or more")
        conv = partial(Conv, kernel_init=kaiming_normal_fan_in, param_dtype=self.param_dtype)
        norm = partial(BatchNorm, axis_name=self.axis_name, frozen=self.frozen, param_dtype=self.param_dtype)
        x = conv(self.width, 7, 2, name="features.conv0")(x.astype(self.dtype))
        x = norm_relu_pool(norm(name="features.norm0"), x, train)
        for number, layers in enumerate(self.blocks, 1):
            if number > 1:
                x = Transition(conv, norm, name=f"features.transition{number - 1}")(x, train)
            block = DenseBlock(layers, self.growth, self.dropout, conv, norm, self.remat,
                               name=f"features.denseblock{number}")  # fmt: skip
            x = block(x, train, keys)
        x = global_average_pool(nn.relu(norm(name="features.norm5")(x, train)))
        return Linear(self.num_classes, self.head_init, param_dtype=self.param_dtype, name=HEAD)(x)


ARCHITECTURES: Mapping[str, partial[DenseNet]] = MappingProxyType(
    {
        "densenet121": partial(DenseNet, (6, 12, 24, 16)),
        "densenet161": partial(DenseNet, (6, 12, 36, 24), 48, 96),
        "densenet169": partial(DenseNet, (6, 12, 32, 32)),
        "densenet201": partial(DenseNet, (6, 12, 48, 32)),
    }
)


def stage_of(path: str) -> int:
    """How deep a parameter lies: 0 for the stem, 1 to 4 for the blocks, 5 for the head.

    A transition counts to the block before it, the last norm to the last block.
    """
    if found := re.match(r"features\.(?:denseblock|transition|norm)([1-5])", path):
        return min(int(found[1]), 4)
    return 5 if path.split("/")[0] == HEAD else 0


# Files of today's torchvision still call the parts of a layer as its first version did.
RENAMED = ((r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),)
FAMILY = Family(ARCHITECTURES, HEAD, stage_of, renamed=RENAMED)
