"""A torchvision-like ResNet as one would write it from Flax's own layers: what ours is measured against, no more.

Its padding, statistics and initial values are Flax's, not torch's; its shapes and its work are the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsft.cli import UserError, nearest
from jaxsft.models.resnet import ARCHITECTURES, Bottleneck
from jaxsft.models.stochastic import Keys


def plain_model(arch: str, num_classes: int, dtype: Any) -> nn.Module:
    """The plain model of an architecture. Raises UserError where none is written."""
    if arch not in ARCHITECTURES:
        raise UserError(f"there is no plain Flax model of {arch} to compare with", nearest(arch, list(ARCHITECTURES)))
    return PlainResNet(arch, num_classes, dtype)


class PlainResNet(nn.Module):
    """Normalised images [N, H, W, 3] to logits [N, num_classes], of the shapes of ARCHITECTURES[arch]."""

    arch: str
    num_classes: int = 1000
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        like = ARCHITECTURES[self.arch]()
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        x = nn.relu(norm()(conv(like.width, (7, 7), 2)(x.astype(self.dtype))))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, size in enumerate(like.stage_sizes):
            for index in range(size):
                stride, planes = 2 if stage > 0 and index == 0 else 1, like.width * 2**stage
                width = planes * like.width_per_group // 64 * like.groups
                if like.block is Bottleneck:
                    y = nn.relu(norm()(conv(width, (1, 1))(x)))
                    y = nn.relu(norm()(conv(width, (3, 3), stride, feature_group_count=like.groups)(y)))
                    y = norm()(conv(planes * 4, (1, 1))(y))
                else:
                    y = nn.relu(norm()(conv(planes, (3, 3), stride)(x)))
                    y = norm()(conv(planes, (3, 3))(y))
                if y.shape != x.shape:
                    x = norm()(conv(y.shape[-1], (1, 1), stride)(x))
                x = nn.relu(y + x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)).astype(jnp.float32))
