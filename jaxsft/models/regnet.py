"""torchvision's fifteen RegNets in Flax Linen.

Radosavovic et al. 2020 (arXiv:2003.13678). Its design space says the widths of all blocks by three numbers; `stages`
turns them into stages. X are ResNeXt's blocks without a widening at their end; Y put squeeze and excitation behind
the 3x3 convolution, as wide between its two layers as a quarter of what the *block* is given, not of what it squeezes.
The biases of those two layers begin as torch's own layers', not as zeros.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.models.blocks import ConvNorm, SqueezeExcitation, relu
from jaxsft.models.family import Family
from jaxsft.models.layers import BatchNorm, Linear
from jaxsft.models.pooling import global_average_pool
from jaxsft.models.stochastic import Keys

HEAD = "fc"
STEM = 32  # channels
MULTIPLE = 8  # of which all widths are one, before the groups have their say
SQUEEZE = 0.25

Stages = tuple[tuple[int, int], ...]  # channels and blocks of each


def stages(depth: int, initial: int, slope: float, multiplier: float, group_width: int) -> Stages:
    """Channels and blocks of each stage, by the paper's equations 2 to 4.

    The width of block j is to be initial + slope * j; it takes the nearest (in logarithms) of initial * multiplier**s
    for whole s, rounded to a multiple of 8, so that neighbours become equal: a stage.
    """
    wanted = [initial + slope * block for block in range(depth)]
    powers = [round(math.log(width / initial) / math.log(multiplier)) for width in wanted]
    widths = [round(initial * multiplier**power / MULTIPLE) * MULTIPLE for power in powers]
    return tuple((whole_groups(width, group_width), len(list(same))) for width, same in itertools.groupby(widths))


def whole_groups(width: int, group_width: int) -> int:
    """The multiple of `group_width` nearest to `width`, halves up, and not more than a tenth below it."""
    if width <= group_width:
        return width  # a single group
    rounded = (2 * width + group_width) // (2 * group_width) * group_width
    return rounded if rounded >= 0.9 * width else rounded + group_width


class Block(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions and a shortcut: [N, H, W, C] to [N, H / stride, W / stride, width].

    Sides are rounded up. The shortcut is a convolution where the block changes the shape, else the identity.
    """

    width: int
    stride: int
    groups: int
    squeeze: float  # of the block's input channels; 0: no squeeze and excitation
    norm: Any  # partial(BatchNorm, ...)
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(ConvNorm, self.width, norm=self.norm, param_dtype=self.param_dtype)
        y = conv(1, activation=nn.relu, name="f.a")(x, train)
        y = conv(3, stride=self.stride, groups=self.groups, activation=nn.relu, name="f.b")(y, train)
        if self.squeeze:
            between = round(self.squeeze * x.shape[-1])
            y = SqueezeExcitation(between, bias_init="torch", param_dtype=self.param_dtype, name="f.se")(y)
        y = conv(1, name="f.c")(y, train)
        if self.stride > 1 or x.shape[-1] != self.width:
            x = conv(1, stride=self.stride, name="proj")(x, train)
        return relu(x + y)


class RegNet(nn.Module):
    """A RegNet from normalised images [N, H, W, 3] of any size to logits [N, num_classes].

    With `train` batch norm takes the batch's statistics. Logits and pooling are float32 at least whatever `dtype`
    (float32, float64, bfloat16) the body computes in. Nothing is drawn at random: `keys` has no use here.
    """

    stages: Stages
    group_width: int  # channels of a group of the 3x3 convolutions
    squeeze: float = 0.0
    num_classes: int = 1000
    head_init: str = "torch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None  # share batch-norm statistics over this axis of devices
    frozen: tuple[str, ...] = ()  # patterns of paths whose batch norm stays on running statistics
    remat: bool = False  # keep only the input of each block for the backward pass, and compute the block again there

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        norm = partial(BatchNorm, axis_name=self.axis_name, frozen=self.frozen, param_dtype=self.param_dtype)
        stem = ConvNorm(STEM, 3, norm, 2, activation=nn.relu, param_dtype=self.param_dtype, name="stem")
        x = stem(x.astype(self.dtype), train)
        for stage, (width, blocks) in enumerate(self.stages, 1):
            for index in range(blocks):
                x = block(
                    width,
                    stride=2 if index == 0 else 1,
                    groups=width // min(self.group_width, width),
                    squeeze=self.squeeze,
                    norm=norm,
                    param_dtype=self.param_dtype,
                    name=f"trunk_output.block{stage}.block{stage}-{index}",
                )(x, train)
        return Linear(self.num_classes, self.head_init, param_dtype=self.param_dtype, name=HEAD)(global_average_pool(x))


# Depth, initial width, slope, multiplier and group width.
PARAMETERS: Mapping[str, tuple[int, int, float, float, int]] = MappingProxyType(
    {
        "regnet_y_400mf": (16, 48, 27.89, 2.09, 8),
        "regnet_y_800mf": (14, 56, 38.84, 2.4, 16),
        "regnet_y_1_6gf": (27, 48, 20.71, 2.65, 24),
        "regnet_y_3_2gf": (21, 80, 42.63, 2.66, 24),
        "regnet_y_8gf": (17, 192, 76.82, 2.19, 56),
        "regnet_y_16gf": (18, 200, 106.23, 2.48, 112),
        "regnet_y_32gf": (20, 232, 115.89, 2.53, 232),
        "regnet_y_128gf": (27, 456, 160.83, 2.52, 264),
        "regnet_x_400mf": (22, 24, 24.48, 2.54, 16),
        "regnet_x_800mf": (16, 56, 35.73, 2.28, 16),
        "regnet_x_1_6gf": (18, 80, 34.01, 2.25, 24),
        "regnet_x_3_2gf": (25, 88, 26.31, 2.25, 48),
        "regnet_x_8gf": (23, 80, 49.56, 2.88, 120),
        "regnet_x_16gf": (22, 216, 55.59, 2.1, 128),
        "regnet_x_32gf": (23, 320, 69.86, 2.0, 168),
    }
)
ARCHITECTURES: Mapping[str, partial[RegNet]] = MappingProxyType(
    {
        arch: partial(RegNet, stages(*parameters), parameters[-1], SQUEEZE if "_y_" in arch else 0.0)
        for arch, parameters in PARAMETERS.items()
    }
)


def stage_of(path: str) -> int:
    """How deep a parameter lies: 0 for the stem, 1 to 4 for the stages, 5 for the head."""
    if found := re.match(r"trunk_output\.block(\d+)", path):
        return int(found[1])
    return 5 if path.split("/")[0] == HEAD else 0


FAMILY = Family(ARCHITECTURES, HEAD, stage_of)
