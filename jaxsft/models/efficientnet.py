"""torchvision's eight EfficientNets and three EfficientNetV2s in Flax Linen.

Tan & Le 2019 (arXiv:1905.11946), 2021 (arXiv:2104.00298). The squeeze is a quarter as wide as the *input* of a block.
Fused blocks, the first of the second version, have one convolution in place of the widening and the depthwise one, and
no squeeze. What batch norm adds to the variance, and how fast it moves, are those of the weights that torchvision took
over: 1e-3 and 0.01 from B5 on, 1e-3 and 0.1 in the second version. Padding is symmetric, not TensorFlow's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.models.blocks import Activation, ConvNorm, InvertedResidual, SqueezeExcitation, to_eights
from jaxsft.models.family import Family
from jaxsft.models.layers import BatchNorm, Linear
from jaxsft.models.pooling import global_average_pool
from jaxsft.models.stochastic import Dropout, Keys, StochasticDepth

HEAD = "classifier.1"


class Stage(NamedTuple):
    """Blocks of one width, the first of which may halve the image."""

    expansion: int
    kernel_size: int
    stride: int
    features: int
    blocks: int
    fused: bool = False


# Table 1 of the first paper, B0's.
STEM = 32  # channels
STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)
# Table 4 of the second, and its larger networks as the authors published them.
SMALL = (
    Stage(1, 3, 1, 24, 2, fused=True),
    Stage(4, 3, 2, 48, 4, fused=True),
    Stage(4, 3, 2, 64, 4, fused=True),
    Stage(4, 3, 2, 128, 6),
    Stage(6, 3, 1, 160, 9),
    Stage(6, 3, 2, 256, 15),
)
MEDIUM = (
    Stage(1, 3, 1, 24, 3, fused=True),
    Stage(4, 3, 2, 48, 5, fused=True),
    Stage(4, 3, 2, 80, 5, fused=True),
    Stage(4, 3, 2, 160, 7),
    Stage(6, 3, 1, 176, 14),
    Stage(6, 3, 2, 304, 18),
    Stage(6, 3, 1, 512, 5),
)
LARGE = (
    Stage(1, 3, 1, 32, 4, fused=True),
    Stage(4, 3, 2, 64, 7, fused=True),
    Stage(4, 3, 2, 96, 7, fused=True),
    Stage(4, 3, 2, 192, 10),
    Stage(6, 3, 1, 224, 19),
    Stage(6, 3, 2, 384, 25),
    Stage(6, 3, 1, 640, 7),
)


class FusedBlock(nn.Module):
    """A convolution that widens, a 1x1 that narrows; one alone where nothing widens. A shortcut where the shape stays.

    Takes [N, H, W, C] and returns [N, H / stride, W / stride, features], rounded up.
    """

    features: int
    expanded: int
    kernel_size: int
    norm: Any  # partial(BatchNorm, ...)
    activation: Activation
    stride: int
    rate: float  # of stochastic depth
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        conv = partial(ConvNorm, norm=self.norm, param_dtype=self.param_dtype)
        widens = self.expanded != x.shape[-1]
        first = self.expanded if widens else self.features
        y = conv(first, self.kernel_size, stride=self.stride, activation=self.activation, name="block.0")(x, train)
        if widens:
            y = conv(self.features, 1, name="block.1")(y, train)
        if self.stride != 1 or x.shape[-1] != self.features:
            return y
        return x + StochasticDepth(self.rate, name="stochastic_depth")(y, keys)


class EfficientNet(nn.Module):
    """An EfficientNet from normalised images [N, H, W, 3] of any size to logits [N, num_classes].

    With `train` batch norm takes the batch's statistics, and with `keys` dropout and stochastic depth draw, the latter
    at a rate that grows linearly from 0 to nearly `stochastic_depth`. Pooling and logits are float32 at least whatever
    `dtype` (float32, float64, bfloat16) the body computes in.
    """

    stem: int  # channels
    stages: tuple[Stage, ...]
    last: int  # channels that are pooled
    dropout: float
    epsilon: float = 1e-5
    momentum: float = 0.1
    num_classes: int = 1000
    stochastic_depth: float = 0.2
    head_init: str = "torch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None  # share batch-norm statistics over this axis of devices
    frozen: tuple[str, ...] = ()  # patterns of paths whose batch norm stays on running statistics
    remat: bool = False  # keep only the input of each block for the backward pass, and compute the block again there

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        norm = partial(
            BatchNorm,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            frozen=self.frozen,
            param_dtype=self.param_dtype,
        )
        conv = partial(ConvNorm, norm=norm, activation=nn.silu, param_dtype=self.param_dtype)
        x = conv(self.stem, 3, stride=2, name="features.0")(x.astype(self.dtype), train)
        total, done = sum(stage.blocks for stage in self.stages), 0
        for number, stage in enumerate(self.stages, 1):
            for index in range(stage.blocks):
                kind: Any = FusedBlock if stage.fused else InvertedResidual
                block = nn.remat(kind, static_argnums=(2,)) if self.remat else kind
                squeeze = partial(SqueezeExcitation, x.shape[-1] // 4, nn.silu)
                x = block(
                    features=stage.features,
                    expanded=stage.expansion * x.shape[-1],
                    kernel_size=stage.kernel_size,
                    norm=norm,
                    activation=nn.silu,
                    stride=stage.stride if index == 0 else 1,
                    rate=self.stochastic_depth * done / total,
                    param_dtype=self.param_dtype,
                    name=f"features.{number}.{index}",
                    **({} if stage.fused else {"squeeze": squeeze}),
                )(x, train, keys)
                done += 1
        x = conv(self.last, 1, name=f"features.{len(self.stages) + 1}")(x, train)
        x = Dropout(self.dropout, name="classifier.0")(global_average_pool(x), keys)
        return Linear(self.num_classes, self.head_init, param_dtype=self.param_dtype, name=HEAD)(x)


def scaled(width: float, depth: float, dropout: float, **norm: float) -> partial[EfficientNet]:
    """B0 so many times as wide and as deep."""
    stages = tuple(
        stage._replace(features=to_eights(stage.features * width), blocks=math.ceil(stage.blocks * depth))
        for stage in STAGES
    )
    return partial(EfficientNet, to_eights(STEM * width), stages, 4 * stages[-1].features, dropout=dropout, **norm)


ARCHITECTURES: Mapping[str, partial[EfficientNet]] = MappingProxyType(
    {
        "efficientnet_b0": scaled(1.0, 1.0, 0.2),
        "efficientnet_b1": scaled(1.0, 1.1, 0.2),
        "efficientnet_b2": scaled(1.1, 1.2, 0.3),
        "efficientnet_b3": scaled(1.2, 1.4, 0.3),
        "efficientnet_b4": scaled(1.4, 1.8, 0.4),
        "efficientnet_b5": scaled(1.6, 2.2, 0.4, epsilon=1e-3, momentum=0.01),
        "efficientnet_b6": scaled(1.8, 2.6, 0.5, epsilon=1e-3, momentum=0.01),
        "efficientnet_b7": scaled(2.0, 3.1, 0.5, epsilon=1e-3, momentum=0.01),
        "efficientnet_v2_s": partial(EfficientNet, 24, SMALL, 1280, dropout=0.2, epsilon=1e-3),
        "efficientnet_v2_m": partial(EfficientNet, 24, MEDIUM, 1280, dropout=0.3, epsilon=1e-3),
        "efficientnet_v2_l": partial(EfficientNet, 32, LARGE, 1280, dropout=0.4, epsilon=1e-3),
    }
)


def stage_of(path: str) -> int:
    """How deep a parameter lies: torch's number in `features`, a stage of blocks each; 9 for the head."""
    found = re.match(r"features\.(\d+)", path)
    return int(found[1]) if found else len(STAGES) + 2


FAMILY = Family(ARCHITECTURES, HEAD, stage_of)
