"""torchvision's MobileNetV2 in Flax Linen.

Sandler et al. 2018 (arXiv:1801.04381): blocks that widen, filter each channel by itself and narrow again, with a
shortcut between the narrow ends. No activation follows the narrowing; the others are ReLU6. The narrowing convolution
and its norm are modules of the block itself in torch, where the two before them are each in one of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.models.blocks import ConvNorm, relu6
from jaxsft.models.family import Family
from jaxsft.models.layers import BatchNorm, Conv, Linear, pointwise
from jaxsft.models.pooling import global_average_pool
from jaxsft.models.stochastic import Dropout, Keys

HEAD = "classifier.1"
STEM = 32  # channels
LAST = 1280


class Stage(NamedTuple):
    """Blocks of one width, the first of which may halve the image."""

    expansion: int
    features: int
    blocks: int
    stride: int


# Table 2 of the paper.
STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


class Block(nn.Module):
    """Widen `expansion` times (unless that is 1), 3x3 depthwise, narrow, and a shortcut where the shape stays.

    Takes [N, H, W, C] and returns [N, H / stride, W / stride, features], rounded up.
    """

    features: int
    expansion: int
    stride: int
    norm: Any  # partial(BatchNorm, ...)
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, norm=self.norm, activation=relu6, param_dtype=self.param_dtype)
        wide = x.shape[-1] * self.expansion
        y, number = x, 0
        if self.expansion != 1:
            y, number = conv(wide, 1, name="conv.0")(y, train), 1
        y = conv(wide, 3, stride=self.stride, groups=wide, name=f"conv.{number}")(y, train)
        narrow = Conv(self.features, 1, param_dtype=self.param_dtype, name=f"conv.{number + 1}")
        y = pointwise(narrow, self.norm(name=f"conv.{number + 2}"), y, train)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class MobileNetV2(nn.Module):
    """A MobileNetV2 from normalised images [N, H, W, 3] of any size to logits [N, num_classes].

    With `train` batch norm takes the batch's statistics, and with `keys` dropout draws. Pooling and logits are float32
    at least whatever `dtype` (float32, float64, bfloat16) the body computes in.
    """

    stages: tuple[Stage, ...]
    num_classes: int = 1000
    dropout: float = 0.2
    head_init: str = "torch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None  # share batch-norm statistics over this axis of devices
    frozen: tuple[str, ...] = ()  # patterns of paths whose batch norm stays on running statistics
    remat: bool = False  # keep only the input of each block for the backward pass, and compute the block again there

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        norm = partial(BatchNorm, axis_name=self.axis_name, frozen=self.frozen, param_dtype=self.param_dtype)
        conv = partial(ConvNorm, norm=norm, activation=relu6, param_dtype=self.param_dtype)
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        x = conv(STEM, 3, stride=2, name="features.0")(x.astype(self.dtype), train)
        number = 1  # torch counts the stem, all blocks and the last convolution in one row
        for stage in self.stages:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                x = block(stage.features, stage.expansion, stride, norm, self.param_dtype, name=f"features.{number}")(
                    x, train
                )
                number += 1
        x = conv(LAST, 1, name=f"features.{number}")(x, train)
        x = Dropout(self.dropout, name="classifier.0")(global_average_pool(x), keys)
        return Linear(self.num_classes, self.head_init, param_dtype=self.param_dtype, name=HEAD)(x)


ARCHITECTURES: Mapping[str, partial[MobileNetV2]] = MappingProxyType({"mobilenet_v2": partial(MobileNetV2, STAGES)})


def stage_of(path: str) -> int:
    """How deep a parameter lies: torch's number in `features`, a block each; 19 for the head."""
    found = re.match(r"features\.(\d+)", path)
    return int(found[1]) if found else sum(stage.blocks for stage in STAGES) + 2


FAMILY = Family(ARCHITECTURES, HEAD, stage_of)
