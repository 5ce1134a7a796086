"""The registry of models: every architecture by torchvision's name, and the family that it belongs to.

A new family is one file beside this one, which ends in its record, and one line here.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from jaxsft.models import (
    convnext,
    densenet,
    efficientnet,
    mobilenetv2,
    mobilenetv3,
    regnet,
    resnet,
    shufflenetv2,
    swin_transformer,
    vgg,
    vision_transformer,
)
from jaxsft.models.family import Family

FAMILIES: list[Family] = [
    resnet.FAMILY,
    vgg.FAMILY,
    mobilenetv2.FAMILY,
    mobilenetv3.FAMILY,
    efficientnet.FAMILY,
    regnet.FAMILY,
    densenet.FAMILY,
    convnext.FAMILY,
    vision_transformer.FAMILY,
    swin_transformer.FAMILY,
    shufflenetv2.FAMILY,
]
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {}
for _family in FAMILIES:
    ARCHITECTURES |= _family.architectures


def register(family: Family) -> None:
    """Make the architectures of another family known to this process."""
    FAMILIES.append(family)
    ARCHITECTURES.update(family.architectures)


def family_of(arch: str) -> Family:
    """The family of an architecture; of two that have one of this name the one registered last.

    Raises:
      KeyError: there is none.
    """
    for family in reversed(FAMILIES):
        if arch in family.architectures:
            return family
    raise KeyError(arch)
