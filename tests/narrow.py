"""One narrow and shallow network of each family, ours and torchvision's, for tests that must compile in seconds.

Importing this file makes the architectures `narrow_vgg`, ... known to this process, on our side (`families.register`)
and on torch's (`oracle.NOT_IN_TORCHVISION`). Two of a family are there where its members differ in kind. Sides of
`SIDE` pixels leave every network something until its head. A further family is a row of `NARROW`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import torch
from torchvision.models import densenet as torch_densenet
from torchvision.models import regnet as torch_regnet
from torchvision.models import vgg as torch_vgg

from convert.make_sample import resnet10_w16
from jaxsft.models import densenet, families, regnet, resnet, vgg
from jaxsft.models.family import Family
from jaxsft.parity import oracle

SIDE = 32  # px


class Narrow(NamedTuple):
    """A family, its narrow network, and torchvision's of the same shape for a number of classes."""

    family: Family
    ours: Callable[..., nn.Module]
    torchs: Callable[[int], torch.nn.Module]


def torch_narrow_vgg(num_classes: int, norm: bool) -> torch.nn.Module:
    """torchvision's convolutions; its classifier is 4096 wide whatever they are, and is put anew in its own layout."""
    stages: list[Any] = [8, "M", 16, "M", 16, "M"]
    model = torch_vgg.VGG(torch_vgg.make_layers(stages, norm), num_classes, init_weights=False)
    hidden, wide = 32, 16 * vgg.POOLED**2
    for index, (before, after) in {0: (wide, hidden), 3: (hidden, hidden), 6: (hidden, num_classes)}.items():
        model.classifier[index] = torch.nn.Linear(before, after)
    return model


def torch_narrow_regnet(num_classes: int, squeeze: float) -> torch.nn.Module:
    """Two stages, the second of two blocks."""
    params = torch_regnet.BlockParams([1, 2], [16, 24], [8, 8], [1.0, 1.0], [2, 2], squeeze)
    return torch_regnet.RegNet(params, num_classes)


def torch_narrow_densenet(num_classes: int) -> torch.nn.Module:
    """Two blocks, of two layers and one, and a transition."""
    return torch_densenet.DenseNet(8, (2, 1), 16, num_classes=num_classes)


VGG_STAGES = ((8,), (16,), (16,))
REGNET_STAGES = ((16, 1), (24, 2))
NARROW: dict[str, Narrow] = {
    "narrow_resnet": Narrow(
        resnet.FAMILY, partial(resnet.ResNet, (1, 1, 1, 1), resnet.BasicBlock, width=16), resnet10_w16
    ),
    "narrow_vgg": Narrow(
        vgg.FAMILY, partial(vgg.VGG, VGG_STAGES, False, hidden=32), partial(torch_narrow_vgg, norm=False)
    ),
    "narrow_vgg_bn": Narrow(
        vgg.FAMILY, partial(vgg.VGG, VGG_STAGES, True, hidden=32), partial(torch_narrow_vgg, norm=True)
    ),
    "narrow_regnet_x": Narrow(
        regnet.FAMILY, partial(regnet.RegNet, REGNET_STAGES, 8), partial(torch_narrow_regnet, squeeze=0.0)
    ),
    "narrow_regnet_y": Narrow(
        regnet.FAMILY, partial(regnet.RegNet, REGNET_STAGES, 8, 0.25), partial(torch_narrow_regnet, squeeze=0.25)
    ),
    "narrow_densenet": Narrow(densenet.FAMILY, partial(densenet.DenseNet, (2, 1), 8, 16), torch_narrow_densenet),
}

for _arch, _narrow in NARROW.items():
    # The family's own record, for this architecture alone.
    families.register(dataclasses.replace(_narrow.family, architectures={_arch: _narrow.ours}))
    oracle.NOT_IN_TORCHVISION[_arch] = _narrow.torchs
