"""torchvision's ten ResNets (and a small one for the sample) in Flax Linen.

He et al. 2015 (arXiv:1512.03385) in torchvision's v1.5: the stride sits on the 3x3 convolution of a bottleneck.
ResNeXt (arXiv:1611.05431) and Wide ResNet (arXiv:1605.07146) are the same blocks with other inner widths. Module names
follow torch's with `layer1.0` written `layer1_0` and `downsample.0/1` written `downsample_conv` and `downsample_bn`.
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

from jaxsft.models.blocks import norm_relu_pool, relu
from jaxsft.models.family import Family
from jaxsft.models.layers import BatchNorm, Conv, Linear, pointwise
from jaxsft.models.pooling import global_average_pool
from jaxsft.models.stochastic import Keys

HEAD = "fc"
Norm = Any  # partial(BatchNorm, ...)
Convolution = Any  # partial(Conv, ...)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34): [N, H, W, C] to [N, H/stride, W/stride, planes]."""

    planes: int
    stride: int
    conv: Convolution
    norm: Norm
    groups: int = 1
    width_per_group: int = 64

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = self.conv(self.planes, 3, self.stride, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y, train))
        y = self.conv(self.planes, 3, name="conv2")(y)
        y = self.norm(name="bn2")(y, train)
        return relu(y + shortcut(self, x, train))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (ResNet-50 and up): to [N, H/stride, W/stride, 4 * planes]."""

    planes: int
    stride: int
    conv: Convolution
    norm: Norm
    groups: int = 1
    width_per_group: int = 64

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = self.planes * self.width_per_group // 64 * self.groups
        y = nn.relu(self.norm(name="bn1")(self.conv(width, 1, name="conv1")(x), train))
        y = self.conv(width, 3, self.stride, self.groups, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y, train))
        y = pointwise(self.conv(self.planes * self.expansion, 1, name="conv3"), self.norm(name="bn3"), y, train)
        return relu(y + shortcut(self, x, train))


def shortcut(block: BasicBlock | Bottleneck, x: jax.Array, train: bool) -> jax.Array:
    """The identity, or a strided 1x1 convolution and batch norm where the block changes the shape, and only there."""
    features = block.planes * block.expansion
    if block.stride == 1 and x.shape[-1] == features:
        return x
    conv = block.conv(features, 1, block.stride, name="downsample_conv")
    return pointwise(conv, block.norm(name="downsample_bn"), x, train)


class ResNet(nn.Module):
    """A ResNet from normalised images [N, H, W, 3] to logits [N, num_classes].

    `train` selects batch statistics and their update; the collection "batch_stats" must then be mutable. Logits and
    pooling are float32 at least whatever `dtype` (float32, float64, bfloat16) the body computes in. Nothing is drawn
    at random: `keys` has no use here.
    """

    stage_sizes: tuple[int, ...]
    block: type[BasicBlock] | type[Bottleneck]
    num_classes: int = 1000
    width: int = 64  # channels of the stem; every further stage doubles it
    groups: int = 1
    width_per_group: int = 64
    head_init: str = "torch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None  # share batch-norm statistics over this axis of devices
    frozen: tuple[str, ...] = ()  # patterns of paths whose batch norm stays on running statistics
    remat: bool = False  # keep only the input of each block for the backward pass, and compute the block again there

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        conv = partial(Conv, param_dtype=self.param_dtype)
        block = nn.remat(self.block, static_argnums=(2,)) if self.remat else self.block
        norm = partial(BatchNorm, axis_name=self.axis_name, frozen=self.frozen, param_dtype=self.param_dtype)
        x = conv(self.width, 7, 2, name="conv1")(x.astype(self.dtype))
        x = norm_relu_pool(norm(name="bn1"), x, train)
        for stage, size in enumerate(self.stage_sizes):
            for index in range(size):
                x = block(
                    planes=self.width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    conv=conv,
                    norm=norm,
                    groups=self.groups,
                    width_per_group=self.width_per_group,
                    name=f"layer{stage + 1}_{index}",
                )(x, train)
        return Linear(self.num_classes, self.head_init, param_dtype=self.param_dtype, name=HEAD)(global_average_pool(x))


ARCHITECTURES: Mapping[str, partial[ResNet]] = MappingProxyType(
    {
        "resnet18": partial(ResNet, (2, 2, 2, 2), BasicBlock),
        "resnet34": partial(ResNet, (3, 4, 6, 3), BasicBlock),
        "resnet50": partial(ResNet, (3, 4, 6, 3), Bottleneck),
        "resnet101": partial(ResNet, (3, 4, 23, 3), Bottleneck),
        "resnet152": partial(ResNet, (3, 8, 36, 3), Bottleneck),
        "resnext50_32x4d": partial(ResNet, (3, 4, 6, 3), Bottleneck, groups=32, width_per_group=4),
        "resnext101_32x8d": partial(ResNet, (3, 4, 23, 3), Bottleneck, groups=32, width_per_group=8),
        "resnext101_64x4d": partial(ResNet, (3, 4, 23, 3), Bottleneck, groups=64, width_per_group=4),
        "wide_resnet50_2": partial(ResNet, (3, 4, 6, 3), Bottleneck, width_per_group=128),
        "wide_resnet101_2": partial(ResNet, (3, 4, 23, 3), Bottleneck, width_per_group=128),
        # Not torchvision's: its layout at a quarter of the width, for the embedded sample and for quick tests.
        "resnet10_w16": partial(ResNet, (1, 1, 1, 1), BasicBlock, width=16),
    }
)


def stage_of(path: str) -> int:
    """How deep a parameter lies: 0 for the stem, 1 to 4 for the stages, 5 for the head."""
    name = path.split("/")[0]
    if name.startswith("layer"):
        return int(name[len("layer")])
    return 5 if name == HEAD else 0


def torch_name(path: str) -> str:
    """torch's name of a module: layer1_0/downsample_conv is layer1.0.downsample.0."""
    path = path.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    return re.sub(r"^layer(\d)_(\d+)", r"layer\1.\2", path).replace("/", ".")


FAMILY = Family(ARCHITECTURES, HEAD, stage_of, torch_name)
