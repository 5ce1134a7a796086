"""torchvision's eight VGGs in Flax Linen.

Simonyan & Zisserman 2014 (arXiv:1409.1556), with and without the batch norm that torchvision adds after every
convolution. Every convolution has a bias, also before batch norm, where it does nothing. The classifier wants 7 x 7
pixels whatever the image: torch's adaptive pooling repeats them where there are fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.models.family import Family, ImageSizeError
from jaxsft.models.layers import BatchNorm, Conv, Linear, at_least_float32
from jaxsft.models.pooling import MaxPool, adaptive_average_pool
from jaxsft.models.stochastic import Dropout, Keys

HEAD = "classifier.6"
POOLED = 7  # px, what the classifier is made for
HIDDEN = 4096

# Channels of the convolutions between one max-pooling and the next: the paper's columns A, B, D and E.
STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(nn.Module):
    """A VGG from normalised images [N, H, W, 3] of 32 px and more to logits [N, num_classes].

    With `train` batch norm takes the batch's statistics, and with `keys` dropout draws. Logits are float32 at least
    whatever `dtype` (float32, float64, bfloat16) the body computes in.

    Raises:
      ImageSizeError: nothing of the image would be left.
    """

    stages: tuple[tuple[int, ...], ...]
    norm: bool
    num_classes: int = 1000
    hidden: int = HIDDEN
    dropout: float = 0.5
    head_init: str = "torch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None  # share batch-norm statistics over this axis of devices
    frozen: tuple[str, ...] = ()  # patterns of paths whose batch norm stays on running statistics
    remat: bool = False  # keep only the input of each stage for the backward pass, and compute the stage again there

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        if min(x.shape[1:3]) < (least := 2 ** len(self.stages)):
            raise ImageSizeError(f"it must be {least} or more")
        x = x.astype(self.dtype)
        first = 0  # torch counts convolutions, norms, ReLUs and poolings in one row
        for channels in self.stages:
            stage = nn.remat(convolutions, static_argnums=(2, 3, 4)) if self.remat else convolutions
            x = stage(self, x, channels, first, train)
            first += len(channels) * (3 if self.norm else 2) + 1
        x = adaptive_average_pool(x, POOLED).transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # torch's order: C, H, W
        linear = partial(Linear, kernel_init=nn.initializers.normal(0.01), param_dtype=self.param_dtype)
        for index in (0, 3):
            x = nn.relu(linear(self.hidden, name=f"classifier.{index}")(x))
            x = Dropout(self.dropout, name=f"classifier.{index + 2}")(x, keys)
        head = Linear(self.num_classes, self.head_init, param_dtype=self.param_dtype, name=HEAD)
        return head(at_least_float32(x))


def convolutions(model: VGG, x: jax.Array, channels: tuple[int, ...], first: int, train: bool) -> jax.Array:
    """One stage, the max-pooling at its end too; `first` is torch's number of its first convolution."""
    step = 3 if model.norm else 2
    for index, features in enumerate(channels):
        number = first + step * index
        conv = Conv(features, 3, bias_init=nn.initializers.zeros, param_dtype=model.param_dtype,
                    name=f"features.{number}")  # fmt: skip
        x = conv(x)
        if model.norm:
            norm = BatchNorm(axis_name=model.axis_name, frozen=model.frozen, param_dtype=model.param_dtype,
                             name=f"features.{number + 1}")  # fmt: skip
            x = norm(x, train)
        x = nn.relu(x)
    return MaxPool(2, 0, name=f"features.{first + step * len(channels)}")(x)


ARCHITECTURES: Mapping[str, partial[VGG]] = MappingProxyType(
    {
        f"vgg{depth}{'_bn' if norm else ''}": partial(VGG, stages, norm)
        for depth, stages in STAGES.items()
        for norm in (False, True)
    }
)


def stage_of(path: str) -> int:
    """How deep a parameter lies: torch's number in `features`, as timm counts VGG's layers; the classifier's lie above.

    No number of VGG-19's with batch norm is above 52.
    """
    part, number = path.split("/")[0].split(".")
    return int(number) + (53 if part == "classifier" else 0)


FAMILY = Family(ARCHITECTURES, HEAD, stage_of)
