"""torchvision's two MobileNetV3s in Flax Linen.

Howard et al. 2019 (arXiv:1905.02244): MobileNetV2's blocks with squeeze and excitation in some and a hard swish in the
deeper ones. The gate of the squeeze is a hard sigmoid, and its width a quarter of the *widened* channels, to eights.
Batch norm has an epsilon of 1e-3 and moves by 0.01. A hidden layer precedes the head, after pooling.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.models.blocks import ConvNorm, InvertedResidual, SqueezeExcitation, hard_sigmoid, hard_swish, to_eights
from jaxsft.models.family import Family
from jaxsft.models.layers import BatchNorm, Linear
from jaxsft.models.pooling import global_average_pool
from jaxsft.models.stochastic import Dropout, Keys

HEAD = "classifier.3"
STEM = 16  # channels
WIDENED = 6  # the last convolution, against the last block


class Bottleneck(NamedTuple):
    """One block."""

    kernel_size: int
    expanded: int  # channels of the depthwise convolution
    features: int
    squeeze: bool
    hard: bool  # hard swish rather than ReLU
    stride: int


# Tables 1 and 2 of the paper.
LARGE = (
    Bottleneck(3, 16, 16, False, False, 1),
    Bottleneck(3, 64, 24, False, False, 2),
    Bottleneck(3, 72, 24, False, False, 1),
    Bottleneck(5, 72, 40, True, False, 2),
    Bottleneck(5, 120, 40, True, False, 1),
    Bottleneck(5, 120, 40, True, False, 1),
    Bottleneck(3, 240, 80, False, True, 2),
    Bottleneck(3, 200, 80, False, True, 1),
    Bottleneck(3, 184, 80, False, True, 1),
    Bottleneck(3, 184, 80, False, True, 1),
    Bottleneck(3, 480, 112, True, True, 1),
    Bottleneck(3, 672, 112, True, True, 1),
    Bottleneck(5, 672, 160, True, True, 2),
    Bottleneck(5, 960, 160, True, True, 1),
    Bottleneck(5, 960, 160, True, True, 1),
)
SMALL = (
    Bottleneck(3, 16, 16, True, False, 2),
    Bottleneck(3, 72, 24, False, False, 2),
    Bottleneck(3, 88, 24, False, False, 1),
    Bottleneck(5, 96, 40, True, True, 2),
    Bottleneck(5, 240, 40, True, True, 1),
    Bottleneck(5, 240, 40, True, True, 1),
    Bottleneck(5, 120, 48, True, True, 1),
    Bottleneck(5, 144, 48, True, True, 1),
    Bottleneck(5, 288, 96, True, True, 2),
    Bottleneck(5, 576, 96, True, True, 1),
    Bottleneck(5, 576, 96, True, True, 1),
)


class MobileNetV3(nn.Module):
    """A MobileNetV3 from normalised images [N, H, W, 3] of any size to logits [N, num_classes].

    With `train` batch norm takes the batch's statistics, and with `keys` dropout draws. Pooling and all after it are
    float32 at least whatever `dtype` (float32, float64, bfloat16) the body computes in.
    """

    blocks: tuple[Bottleneck, ...]
    hidden: int
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
        norm = partial(
            BatchNorm,
            momentum=0.01,
            epsilon=1e-3,
            axis_name=self.axis_name,
            frozen=self.frozen,
            param_dtype=self.param_dtype,
        )
        conv = partial(ConvNorm, norm=norm, activation=hard_swish, param_dtype=self.param_dtype)
        residual = nn.remat(InvertedResidual, static_argnums=(2,)) if self.remat else InvertedResidual
        x = conv(STEM, 3, stride=2, name="features.0")(x.astype(self.dtype), train)
        for number, block in enumerate(self.blocks, 1):
            squeeze = partial(SqueezeExcitation, to_eights(block.expanded // 4), gate=hard_sigmoid)
            x = residual(
                block.features,
                block.expanded,
                block.kernel_size,
                norm,
                hard_swish if block.hard else nn.relu,
                block.stride,
                squeeze if block.squeeze else None,
                param_dtype=self.param_dtype,
                name=f"features.{number}",
            )(x, train)
        x = conv(WIDENED * x.shape[-1], 1, name=f"features.{len(self.blocks) + 1}")(x, train)
        hidden = Linear(self.hidden, nn.initializers.normal(0.01), param_dtype=self.param_dtype, name="classifier.0")
        x = hard_swish(hidden(global_average_pool(x)))
        x = Dropout(self.dropout, name="classifier.2")(x, keys)
        return Linear(self.num_classes, self.head_init, param_dtype=self.param_dtype, name=HEAD)(x)


ARCHITECTURES: Mapping[str, partial[MobileNetV3]] = MappingProxyType(
    {
        "mobilenet_v3_large": partial(MobileNetV3, LARGE, 1280),
        "mobilenet_v3_small": partial(MobileNetV3, SMALL, 1024),
    }
)


def stage_of(path: str) -> int:
    """How deep a parameter lies: torch's number in `features`, a block each; the hidden layer and the head lie above.

    No number of the large network's is above 16, nor of the small one's above 12.
    """
    part, number = path.split("/")[0].split(".")
    if part == "features":
        return int(number)
    return len(LARGE) + (3 if path.startswith(HEAD) else 2)


FAMILY = Family(ARCHITECTURES, HEAD, stage_of)
