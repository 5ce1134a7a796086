"""torchvision's four ConvNeXts in Flax Linen.

Liu et al. 2022 (arXiv:2201.03545): a residual branch is a 7x7 depthwise convolution, layer norm and two linear layers
with the exact GELU between them, scaled channel by channel and dropped at random. Images are cut into patches and made
smaller by convolutions that see every pixel once and leave out what is left over at the right and at the bottom. Layer
norm stands where others have batch norm, so that training and evaluation differ by stochastic depth alone.
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

from jaxsft.models.blocks import gelu
from jaxsft.models.family import Family, ImageSizeError
from jaxsft.models.layers import Conv, LayerNorm, Linear, at_least_float32
from jaxsft.models.pooling import global_average_pool
from jaxsft.models.stochastic import Keys, StochasticDepth

HEAD = "classifier.2"
EPSILON = 1e-6
LAYER_SCALE = 1e-6  # what it begins at
SMALLEST = 32  # px, of which one is left at the end
drawn = nn.initializers.normal(0.02)  # torch's is truncated at +-2, a hundred deviations away


class Block(nn.Module):
    """One residual block: [N, H, W, C] to the same."""

    stochastic_depth: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, keys: Keys) -> jax.Array:
        channels = x.shape[-1]
        linear = partial(Linear, kernel_init=drawn, param_dtype=self.param_dtype)
        y = Conv(channels, 7, groups=channels, kernel_init=drawn, bias_init=nn.initializers.zeros,
                 param_dtype=self.param_dtype, name="block.0")(x)  # fmt: skip
        y = LayerNorm(EPSILON, self.param_dtype, name="block.2")(y)
        y = gelu(linear(4 * channels, name="block.3")(y))
        y = linear(channels, name="block.5")(y)
        begin = nn.initializers.constant(LAYER_SCALE)
        scale = self.param("layer_scale", begin, (channels, 1, 1), self.param_dtype)  # torch's shape, for [N, C, H, W]
        y = y * scale.reshape(-1).astype(y.dtype)
        return x + StochasticDepth(self.stochastic_depth, name="stochastic_depth")(y, keys)


class ConvNeXt(nn.Module):
    """A ConvNeXt from normalised images [N, H, W, 3] of 32 px and more to logits [N, num_classes].

    With `keys` stochastic depth draws; `train` changes nothing. Logits are float32 at least whatever `dtype` (float32,
    float64, bfloat16) the body computes in.

    Raises:
      ImageSizeError: a side is shorter than 32 px.
    """

    widths: tuple[int, ...]  # channels of each stage
    depths: tuple[int, ...]  # blocks of each stage
    stochastic_depth: float  # of the last block; from the first, which has none, it grows evenly
    num_classes: int = 1000
    head_init: str = "torch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None  # there are no batch statistics to share
    frozen: tuple[str, ...] = ()  # and none to freeze
    remat: bool = False  # keep only the input of each block for the backward pass, and compute the block again there

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        if min(x.shape[1:3]) < SMALLEST:
            raise ImageSizeError(f"it must be at least {SMALLEST}")
        block = nn.remat(Block) if self.remat else Block
        conv = partial(Conv, padding=0, kernel_init=drawn, bias_init=nn.initializers.zeros,
                       param_dtype=self.param_dtype)  # fmt: skip
        norm = partial(LayerNorm, EPSILON, self.param_dtype)
        x = conv(self.widths[0], 4, 4, name="features.0.0")(x.astype(self.dtype))
        x = norm(name="features.0.1")(x)
        done, last = 0, sum(self.depths) - 1
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths)):
            if stage > 0:
                x = norm(name=f"features.{2 * stage}.0")(x)
                x = conv(width, 2, 2, name=f"features.{2 * stage}.1")(x)
            for index in range(depth):
                rate = self.stochastic_depth * done / last
                x = block(rate, self.param_dtype, name=f"features.{2 * stage + 1}.{index}")(x, keys)
                done += 1
        x = norm(name="classifier.0")(global_average_pool(x)[:, None, None])[:, 0, 0]  # torch's is [N, C, 1, 1]
        return Linear(self.num_classes, self.head_init, param_dtype=self.param_dtype, name=HEAD)(at_least_float32(x))


ARCHITECTURES: Mapping[str, partial[ConvNeXt]] = MappingProxyType(
    {
        "convnext_tiny": partial(ConvNeXt, (96, 192, 384, 768), (3, 3, 9, 3), stochastic_depth=0.1),
        "convnext_small": partial(ConvNeXt, (96, 192, 384, 768), (3, 3, 27, 3), stochastic_depth=0.4),
        "convnext_base": partial(ConvNeXt, (128, 256, 512, 1024), (3, 3, 27, 3), stochastic_depth=0.5),
        "convnext_large": partial(ConvNeXt, (192, 384, 768, 1536), (3, 3, 27, 3), stochastic_depth=0.5),
    }
)


def stage_of(path: str) -> int:
    """How deep a parameter lies: torch's number in `features`, 0 to 7; 8 for the norm before the head, and the head."""
    found = re.match(r"features\.(\d+)", path)
    return int(found[1]) if found else 8


FAMILY = Family(ARCHITECTURES, HEAD, stage_of)
