"""torchvision's six Swin Transformers in Flax Linen.

Liu et al. 2021 (arXiv:2103.14030), and version 2 (arXiv:2111.09883), which normalises what attention and MLP give
instead of what they take, and attends by cosines; windows.py has the attention. Between stages each 2x2 pixels become
one of twice the channels, an odd side padded with zeros. Images of any size from 4 px on are taken. Layer norm stands
where others have batch norm, so that training and evaluation differ by stochastic depth alone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.models.attention import MLP
from jaxsft.models.family import Family, ImageSizeError
from jaxsft.models.layers import Conv, LayerNorm, Linear, at_least_float32, torch_linear_uniform
from jaxsft.models.pooling import global_average_pool
from jaxsft.models.stochastic import Keys, StochasticDepth
from jaxsft.models.windows import WindowAttention, WindowAttentionV2, drawn, relative_coordinates, relative_index

HEAD = "head"
EPSILON = 1e-5
PATCH = 4  # px


class Block(nn.Module):
    """Attention within windows and an MLP, a shortcut around each: [N, H, W, C] to the same."""

    attention: type[WindowAttention]
    heads: int
    window: int
    shift: int
    stochastic_depth: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, keys: Keys) -> jax.Array:
        attention = self.attention(self.heads, self.window, self.shift, self.param_dtype, name="attn")
        mlp = MLP(4 * x.shape[-1], drawn, param_dtype=self.param_dtype, name="mlp")
        depth = StochasticDepth(self.stochastic_depth, name="stochastic_depth")
        branches: tuple[tuple[str, Callable[[jax.Array], jax.Array]], ...]
        branches = (("norm1", attention), ("norm2", lambda x: mlp(x, keys)))
        for draw, (name, layer) in enumerate(branches):
            norm = LayerNorm(EPSILON, self.param_dtype, name=name)
            y = layer(norm(x)) if self.attention.version == 1 else norm(layer(x))
            x = x + depth(y, keys, draw)
        return x


class PatchMerging(nn.Module):
    """[N, H, W, C] to [N, H / 2, W / 2, 2C], rounded up: a linear layer of four pixels, column by column.

    Version 1 has a norm before it, version 2 after it.
    """

    version: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, height, width, channels = x.shape
        if height % 2 or width % 2:
            x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        cells = x.reshape(n, -(-height // 2), 2, -(-width // 2), 2, channels)
        x = cells.transpose(0, 1, 3, 4, 2, 5).reshape(n, *cells.shape[1:4:2], 4 * channels)
        norm = LayerNorm(EPSILON, self.param_dtype, name="norm")
        linear = Linear(2 * channels, drawn, use_bias=False, param_dtype=self.param_dtype, name="reduction")
        return linear(norm(x)) if self.version == 1 else norm(linear(x))


class SwinTransformer(nn.Module):
    """A Swin Transformer from normalised images [N, H, W, 3] of 4 px and more to logits [N, num_classes].

    With `keys` stochastic depth draws; `train` changes nothing. Logits are float32 at least whatever `dtype` (float32,
    float64, bfloat16) the body computes in.

    Raises:
      ImageSizeError: a side is shorter than 4 px.
    """

    attention: type[WindowAttention]
    window: int  # px of the patches' image
    width: int  # channels of the first stage; every further one doubles them
    depths: tuple[int, ...]  # blocks of each stage
    heads: tuple[int, ...]
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
        if min(x.shape[1:3]) < PATCH:
            raise ImageSizeError(f"it must be at least {PATCH}")
        block = nn.remat(Block) if self.remat else Block
        norm = partial(LayerNorm, EPSILON, self.param_dtype)
        uniform = partial(torch_linear_uniform, fan_in=3 * PATCH**2)
        conv = Conv(self.width, PATCH, PATCH, padding=0, kernel_init=uniform, bias_init=uniform,
                    param_dtype=self.param_dtype, name="features.0.0")  # fmt: skip
        x = norm(name="features.0.2")(conv(x.astype(self.dtype)))
        done, last = 0, sum(self.depths) - 1
        for stage, (depth, heads) in enumerate(zip(self.depths, self.heads)):
            if stage > 0:
                x = PatchMerging(self.attention.version, self.param_dtype, name=f"features.{2 * stage}")(x)
            for index in range(depth):
                shift = self.window // 2 if index % 2 else 0
                rate = self.stochastic_depth * done / last
                name = f"features.{2 * stage + 1}.{index}"
                x = block(self.attention, heads, self.window, shift, rate, self.param_dtype, name=name)(x, keys)
                done += 1
        x = at_least_float32(global_average_pool(norm(name="norm")(x)))
        return Linear(self.num_classes, self.head_init, param_dtype=self.param_dtype, name=HEAD)(x)


# Width, depths, heads, and stochastic depth.
SIZES: Mapping[str, tuple[int, tuple[int, ...], tuple[int, ...], float]] = {
    "t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
    "s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
    "b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 0.5),
}
VERSIONS = {"swin": (WindowAttention, 7), "swin_v2": (WindowAttentionV2, 8)}
ARCHITECTURES: Mapping[str, partial[SwinTransformer]] = MappingProxyType(
    {
        f"{version}_{size}": partial(SwinTransformer, attention, window, *fields, stochastic_depth=rate)
        for version, (attention, window) in VERSIONS.items()
        for size, (*fields, rate) in SIZES.items()
    }
)


def stage_of(path: str) -> int:
    """How deep a parameter lies: 0 for the patches, then one a block of the deepest, a merging with the block after it.

    The third stage takes 5 to 22, of which Swin-T leaves some out. The last norm goes with the head, as in timm.
    """
    found = re.match(r"features\.(\d)(?:\.(\d+))?", path)
    if not found:
        return 25
    part, block = int(found[1]), int(found[2] or 0)
    return (1, 3, 5, 23)[part // 2] + block if part % 2 else (0, 3, 5, 23)[part // 2]


@functools.cache
def constants(arch: str) -> Mapping[str, np.ndarray]:
    """What torch's state_dict of an architecture holds beside variables."""
    return tables(ARCHITECTURES[arch])


def tables(architecture: partial[SwinTransformer]) -> Mapping[str, np.ndarray]:
    """Of every block torch's state_dict has the tables by which windows.py finds a bias."""
    attention, window, _, depths, *_ = architecture.args
    found = {"relative_position_index": relative_index(window)}
    if attention.version == 2:
        found["relative_coords_table"] = relative_coordinates(window)
    return {
        f"features.{2 * stage + 1}.{index}.attn.{name}": table
        for stage, depth in enumerate(depths)
        for index in range(depth)
        for name, table in found.items()
    }


FAMILY = Family(ARCHITECTURES, HEAD, stage_of, constants=constants)
