"""torchvision's four ShuffleNetV2s in Flax Linen.

Ma et al. 2018 (arXiv:1807.11164): a block passes one half of the channels on and filters the other, depthwise between
two 1x1 convolutions, and then shuffles the halves. The first block of a stage filters all of them twice instead, so
that channels double while the image halves. Nothing is added, so there is no residual branch to scale or to drop.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.models.blocks import ReLU, norm_relu_pool
from jaxsft.models.family import Family
from jaxsft.models.layers import BatchNorm, Conv, Linear, pointwise, torch_linear_uniform
from jaxsft.models.pooling import global_average_pool
from jaxsft.models.stochastic import Keys

HEAD = "fc"
BLOCKS = (4, 8, 4)  # of the stages, which torch counts from 2
# Table 5 of the paper: channels of the stem, of the three stages, and of the last convolution.
CHANNELS = {
    "0_5": (24, 48, 96, 192, 1024),
    "1_0": (24, 116, 232, 464, 1024),
    "1_5": (24, 176, 352, 704, 1024),
    "2_0": (24, 244, 488, 976, 2048),
}


def fresh(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """What `torch.nn.Conv2d.reset_parameters` gives a kernel [k, k, C_in, C_out]; torchvision leaves it at that."""
    return torch_linear_uniform(key, shape, dtype, fan_in=math.prod(shape[:3]))


def channel_shuffle(x: jax.Array) -> jax.Array:
    """The channels of the two halves of [..., C] in turn: 0, C / 2, 1, C / 2 + 1, ..."""
    return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


class Block(nn.Module):
    """torchvision's InvertedResidual: [N, H, W, C] to [N, H / stride, W / stride, features], rounded up.

    At stride 1 `features` is C, and the first half of the channels is passed on as it is.
    """

    features: int
    stride: int
    norm: Any  # partial(BatchNorm, ...)
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        half = self.features // 2
        conv = partial(Conv, kernel_init=fresh, param_dtype=self.param_dtype)

        def narrow(x: jax.Array, name: str, index: int) -> jax.Array:
            layer, norm = conv(half, 1, name=f"{name}.{index}"), self.norm(name=f"{name}.{index + 1}")
            return nn.relu(pointwise(layer, norm, x, train))

        def depthwise(x: jax.Array, name: str, index: int) -> jax.Array:
            layer = conv(x.shape[-1], 3, self.stride, groups=x.shape[-1], name=f"{name}.{index}")
            return self.norm(name=f"{name}.{index + 1}")(layer(x), train)

        if self.stride == 1:
            kept, x = jnp.split(x, 2, axis=-1)
        else:
            kept = narrow(depthwise(x, "branch1", 0), "branch1", 2)
        y = narrow(depthwise(narrow(x, "branch2", 0), "branch2", 3), "branch2", 5)
        return channel_shuffle(jnp.concatenate([kept, y], axis=-1))


class ShuffleNetV2(nn.Module):
    """A ShuffleNetV2 from normalised images [N, H, W, 3] of any size to logits [N, num_classes].

    With `train` batch norm takes the batch's statistics. Pooling and logits are float32 at least whatever `dtype`
    (float32, float64, bfloat16) the body computes in. Nothing is drawn at random: `keys` has no use here.
    """

    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    num_classes: int = 1000
    head_init: str = "torch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None  # share batch-norm statistics over this axis of devices
    frozen: tuple[str, ...] = ()  # patterns of paths whose batch norm stays on running statistics
    remat: bool = False  # keep only the input of each block for the backward pass, and compute the block again there

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        norm = partial(BatchNorm, axis_name=self.axis_name, frozen=self.frozen, param_dtype=self.param_dtype)
        conv = partial(Conv, kernel_init=fresh, param_dtype=self.param_dtype)
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        stem, *stages, last = self.channels
        x = conv(stem, 3, 2, name="conv1.0")(x.astype(self.dtype))
        x = norm_relu_pool(norm(name="conv1.1"), x, train)
        for stage, (blocks, features) in enumerate(zip(self.blocks, stages, strict=True), 2):
            for index in range(blocks):
                stride = 2 if index == 0 else 1
                x = block(features, stride, norm, self.param_dtype, name=f"stage{stage}.{index}")(x, train)
        x = ReLU(name="conv5.2")(pointwise(conv(last, 1, name="conv5.0"), norm(name="conv5.1"), x, train))
        return Linear(self.num_classes, self.head_init, param_dtype=self.param_dtype, name=HEAD)(global_average_pool(x))


ARCHITECTURES: Mapping[str, partial[ShuffleNetV2]] = MappingProxyType(
    {f"shufflenet_v2_x{width}": partial(ShuffleNetV2, BLOCKS, channels) for width, channels in CHANNELS.items()}
)


def stage_of(path: str) -> int:
    """How deep a parameter lies: 0 for the stem, then a number for each block, the last convolution, and the head."""
    if found := re.match(r"stage(\d)\.(\d+)", path):
        stage, index = map(int, found.groups())
        return 1 + sum(BLOCKS[: stage - 2]) + index
    first = path.split("/")[0]
    return {"conv1.0": 0, "conv1.1": 0, HEAD: sum(BLOCKS) + 2}.get(first, sum(BLOCKS) + 1)


FAMILY = Family(ARCHITECTURES, HEAD, stage_of)
