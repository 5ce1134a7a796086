"""torchvision's five Vision Transformers in Flax Linen.

Dosovitskiy et al. 2020 (arXiv:2010.11929), with layer norm before attention and MLP. One position embedding a patch is
learnt, so that a network takes images of one size only; `resized` makes it one for another size, as torchvision does.
The queries, keys and values come from one matrix [3C, C] in torch's layout, for it is a parameter of the attention
itself. Layer norm stands where others have batch norm, so that training and evaluation differ by dropout alone.
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
import numpy as np
from jax import lax

from jaxsft.models.attention import MLP, attend
from jaxsft.models.family import IMAGE_SIZE, Family, ImageSizeError
from jaxsft.models.layers import Conv, LayerNorm, Linear, at_least_float32
from jaxsft.models.matmul import matmul
from jaxsft.models.stochastic import Dropout, Keys

HEAD = "heads.head"
EPSILON = 1e-6
CUBIC = -0.75  # the slope of the bicubic kernel at 1, which torch takes


class SelfAttention(nn.Module):
    """`torch.nn.MultiheadAttention` of [N, S, C] with itself; queries, keys and values lie one after the other."""

    heads: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, tokens, channels = x.shape
        weight = self.param(
            "in_proj_weight", nn.initializers.xavier_uniform(), (3 * channels, channels), self.param_dtype
        )
        bias = self.param("in_proj_bias", nn.initializers.zeros, (3 * channels,), self.param_dtype)
        qkv = matmul(x, weight.T.astype(x.dtype)) + bias.astype(x.dtype)
        q, k, v = (part.reshape(n, tokens, self.heads, -1) for part in jnp.split(qkv, 3, -1))
        y = attend(q * (channels // self.heads) ** -0.5, k, v).reshape(x.shape)
        linear = Linear(channels, bias_init=nn.initializers.zeros, param_dtype=self.param_dtype, name="out_proj")
        return linear(y)


class EncoderBlock(nn.Module):
    """Attention and MLP, each with layer norm before it and a shortcut around both: [N, S, C] to the same."""

    heads: int
    hidden: int
    dropout: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, keys: Keys) -> jax.Array:
        norm = partial(LayerNorm, EPSILON, self.param_dtype)
        y = SelfAttention(self.heads, self.param_dtype, name="self_attention")(norm(name="ln_1")(x))
        x = x + Dropout(self.dropout, name="dropout")(y, keys)
        mlp = MLP(self.hidden, nn.initializers.xavier_uniform(), nn.initializers.normal(1e-6), self.dropout,
                  self.param_dtype, name="mlp")  # fmt: skip
        return x + mlp(norm(name="ln_2")(x), keys)


class Encoder(nn.Module):
    """The position embedding, the blocks and the last norm: tokens [N, S, C] to the same.

    Raises:
      ImageSizeError: the variables are for another number of tokens.
    """

    layers: int
    heads: int
    hidden: int
    dropout: float
    remat: bool
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, keys: Keys) -> jax.Array:
        if self.has_variable("params", "pos_embedding"):
            known = self.get_variable("params", "pos_embedding").shape[1] - 1
            if known != x.shape[1] - 1:
                raise ImageSizeError(f"its variables are for images of {known} patches, not of {x.shape[1] - 1}")
        drawn = nn.initializers.normal(0.02)
        x = x + self.param("pos_embedding", drawn, (1, *x.shape[1:]), self.param_dtype).astype(x.dtype)
        x = Dropout(self.dropout, name="dropout")(x, keys)
        block = nn.remat(EncoderBlock) if self.remat else EncoderBlock
        for index in range(self.layers):
            name = f"layers.encoder_layer_{index}"
            x = block(self.heads, self.hidden, self.dropout, self.param_dtype, name=name)(x, keys)
        return LayerNorm(EPSILON, self.param_dtype, name="ln")(x)


class VisionTransformer(nn.Module):
    """A Vision Transformer from normalised square images [N, H, H, 3] to logits [N, num_classes].

    H is a multiple of `patch`, and the one that the variables were made for. With `keys` dropout draws; `train` changes
    nothing. Logits are float32 at least whatever `dtype` (float32, float64, bfloat16) the body computes in.

    Raises:
      ImageSizeError: images of another size.
    """

    patch: int  # px
    width: int  # channels of a token
    layers: int
    heads: int
    hidden: int  # channels inside an MLP
    dropout: float = 0.0
    num_classes: int = 1000
    head_init: str = "torch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None  # there are no batch statistics to share
    frozen: tuple[str, ...] = ()  # and none to freeze
    remat: bool = False  # keep only the input of each block for the backward pass, and compute the block again there

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        n, height, width, _ = x.shape
        if height != width:
            raise ImageSizeError(f"images must be square, and these have {height} x {width} px")
        check_side(height, self.patch)
        drawn = nn.initializers.normal((3 * self.patch**2) ** -0.5)
        conv = Conv(self.width, self.patch, self.patch, padding=0, kernel_init=drawn, bias_init=nn.initializers.zeros,
                    param_dtype=self.param_dtype, name="conv_proj")  # fmt: skip
        x = conv(x.astype(self.dtype)).reshape(n, (height // self.patch) ** 2, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width), self.param_dtype)
        x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (n, 1, self.width)), x], 1)
        encoder = Encoder(self.layers, self.heads, self.hidden, self.dropout, self.remat, self.param_dtype,
                          name="encoder")  # fmt: skip
        x = at_least_float32(encoder(x, keys)[:, 0])
        return Linear(self.num_classes, self.head_init, param_dtype=self.param_dtype, name=HEAD)(x)


def check_side(side: int, patch: int) -> None:
    """Raise an ImageSizeError where patches do not fill a side (px)."""
    if side < 1 or side % patch:
        raise ImageSizeError(f"it must be a multiple of {patch}")


ARCHITECTURES: Mapping[str, partial[VisionTransformer]] = MappingProxyType(
    {
        "vit_b_16": partial(VisionTransformer, 16, 768, 12, 12, 3072),
        "vit_b_32": partial(VisionTransformer, 32, 768, 12, 12, 3072),
        "vit_l_16": partial(VisionTransformer, 16, 1024, 24, 16, 4096),
        "vit_l_32": partial(VisionTransformer, 32, 1024, 24, 16, 4096),
        "vit_h_14": partial(VisionTransformer, 14, 1280, 32, 16, 5120),
    }
)


def stage_of(path: str) -> int:
    """How deep a parameter lies: 0 for patches, token and positions, then one a block; of ViT-H's 32 the last is 32.

    The last norm goes with the head, as in timm.
    """
    block = re.match(r"encoder/layers\.encoder_layer_(\d+)", path)
    if block:
        return int(block[1]) + 1
    return 33 if path.startswith(("encoder/ln", "heads")) else 0


def cubic_matrix(old: int, new: int) -> np.ndarray:
    """float64 [new, old] that resizes a row of `old` values to `new`, the outermost of both in the same places.

    Bicubic as torch's interpolate(mode="bicubic", align_corners=True): the four nearest are weighted by Keys' kernel
    (1981), also where the row becomes shorter, and beyond its ends the outermost value repeats.
    """
    matrix = np.zeros((new, old))
    places = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    first = np.floor(places).astype(int)
    for tap in range(-1, 3):
        d = np.abs(places - (first + tap))
        near = ((CUBIC + 2) * d - (CUBIC + 3)) * d * d + 1
        far = CUBIC * (((d - 5) * d + 8) * d - 4)
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(d <= 1, near, far))
    return matrix


def resized(variables: dict[str, Any], image_size: int) -> dict[str, Any]:
    """The variables for images of `image_size` px: the position embedding resized, the class token's left as it is.

    As torchvision's `interpolate_embeddings`, on arrays of numpy or JAX. Nothing that is given is changed.

    Raises:
      ImageSizeError: patches do not fill the side.
    """
    params = variables["params"]
    patch, embedding = params["conv_proj"]["kernel"].shape[0], params["encoder"]["pos_embedding"]
    check_side(image_size, patch)
    old, new = round((embedding.shape[1] - 1) ** 0.5), image_size // patch
    if old != new:
        embedding = resized_embedding(embedding, cubic_matrix(old, new))
    encoder = {**params["encoder"], "pos_embedding": embedding}
    return {**variables, "params": {**params, "encoder": encoder}}


def image_size_of(tensors: Mapping[str, np.ndarray]) -> int:
    """The side (px) of the images that tensors by torch's names are for; the usual one where they do not say."""
    embedding, kernel = tensors.get("encoder.pos_embedding"), tensors.get("conv_proj.weight")
    if embedding is None or embedding.ndim != 3 or kernel is None or kernel.ndim != 4:
        return IMAGE_SIZE
    return round(max(embedding.shape[1] - 1, 1) ** 0.5) * kernel.shape[3]


def resized_embedding(embedding: Any, matrix: np.ndarray) -> Any:
    """Position embedding [1, 1 + old^2, C] as [1, 1 + new^2, C] of the same dtype, by a matrix [new, old]."""
    new, old = matrix.shape
    xp = jnp if isinstance(embedding, jax.Array) else np
    dtype = jnp.promote_types(embedding.dtype, jnp.float32)
    grid = embedding[0, 1:].astype(dtype).reshape(old, old, -1)
    more = {"precision": lax.Precision.HIGHEST} if xp is jnp else {"optimize": True}
    grid = xp.einsum("ih,jw,hwc->ijc", *(xp.asarray(matrix, dtype),) * 2, grid, **more)
    patches = grid.reshape(1, new * new, -1).astype(embedding.dtype)
    return xp.concatenate([embedding[:, :1], patches], 1)


FAMILY = Family(
    ARCHITECTURES,
    HEAD,
    stage_of,
    renamed=((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
    resized=resized,
    image_size_of=image_size_of,
    # Of the last block only the class token is read: what is behind its attention depends on no patch.
    map_layer=r"encoder\.layers\.encoder_layer_\d+\.ln_1",
)
