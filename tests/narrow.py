"""One narrow and shallow network of each family, ours and torchvision's, for tests that must compile in seconds.

Importing this file makes the architectures `narrow_vgg`, ... known to this process, on our side (`families.register`)
and on torch's (`networks.NOT_IN_TORCHVISION`). Two of a family are there where its members differ in kind. Sides of
`SIDE` pixels leave every network something until its head. A further family is a row of `NARROW`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.models import convnext as torch_convnext
from torchvision.models import densenet as torch_densenet
from torchvision.models import efficientnet as torch_efficientnet
from torchvision.models import mobilenetv2 as torch_mobilenetv2
from torchvision.models import mobilenetv3 as torch_mobilenetv3
from torchvision.models import regnet as torch_regnet
from torchvision.models import shufflenetv2 as torch_shufflenetv2
from torchvision.models import swin_transformer as torch_swin
from torchvision.models import vgg as torch_vgg
from torchvision.models import vision_transformer as torch_vit

from convert.make_sample import resnet10_w16
from jaxsft.models import (
    convnext,
    densenet,
    efficientnet,
    families,
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
from jaxsft.models.windows import WindowAttention, WindowAttentionV2
from jaxsft.parity import networks

SIDE = 32  # px


class Narrow(NamedTuple):
    """A family, its narrow network, and torchvision's of the same shape for a number of classes."""

    family: Family
    ours: partial[Any]
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


def torch_narrow_mobilenet_v3(num_classes: int) -> torch.nn.Module:
    block = partial(torch_mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [block(16, 3, 16, 16, False, "RE", 1), block(16, 5, 40, 24, True, "HS", 2),
              block(24, 3, 72, 24, True, "RE", 1)]  # fmt: skip
    return torch_mobilenetv3.MobileNetV3(blocks, 32, num_classes)


def torch_narrow_efficientnet(num_classes: int, version: int) -> torch.nn.Module:
    plain, fused = torch_efficientnet.MBConvConfig, torch_efficientnet.FusedMBConvConfig
    if version == 1:
        blocks: list[Any] = [plain(1, 3, 1, 16, 8, 1), plain(4, 5, 2, 8, 16, 2)]
        return torch_efficientnet.EfficientNet(blocks, 0.2, num_classes=num_classes, last_channel=32)
    blocks = [fused(1, 3, 1, 16, 16, 1), fused(4, 3, 2, 16, 24, 2), plain(4, 3, 2, 24, 32, 1)]
    norm = partial(torch.nn.BatchNorm2d, eps=1e-3)
    return torch_efficientnet.EfficientNet(blocks, 0.2, num_classes=num_classes, norm_layer=norm, last_channel=32)


def torch_narrow_convnext(num_classes: int) -> torch.nn.Module:
    blocks = [torch_convnext.CNBlockConfig(16, 32, 1), torch_convnext.CNBlockConfig(32, None, 2)]
    return torch_convnext.ConvNeXt(blocks, 0.3, num_classes=num_classes)


def torch_narrow_vit(num_classes: int) -> torch.nn.Module:
    return torch_vit.VisionTransformer(SIDE, 8, 2, 2, 16, 32, dropout=0.1, num_classes=num_classes)


def torch_narrow_swin(num_classes: int, version: int) -> torch.nn.Module:
    """Windows of 4: the first stage of an image of SIDE px has four of them, the second one."""
    second: dict[str, Any] = {
        "block": torch_swin.SwinTransformerBlockV2, "downsample_layer": torch_swin.PatchMergingV2
    }  # fmt: skip
    return torch_swin.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.3, num_classes=num_classes,
        **(second if version == 2 else {}),
    )  # fmt: skip


VGG_STAGES = ((8,), (16,), (16,))
REGNET_STAGES = ((16, 1), (24, 2))
MOBILENETV2 = (mobilenetv2.Stage(1, 16, 1, 1), mobilenetv2.Stage(2, 24, 2, 2))
MOBILENETV3 = (
    mobilenetv3.Bottleneck(3, 16, 16, False, False, 1),
    mobilenetv3.Bottleneck(5, 40, 24, True, True, 2),
    mobilenetv3.Bottleneck(3, 72, 24, True, False, 1),
)
EFFICIENTNET = (efficientnet.Stage(1, 3, 1, 8, 1), efficientnet.Stage(4, 5, 2, 16, 2))
EFFICIENTNETV2 = (
    efficientnet.Stage(1, 3, 1, 16, 1, fused=True),
    efficientnet.Stage(4, 3, 2, 24, 2, fused=True),
    efficientnet.Stage(4, 3, 2, 32, 1),
)
SWINS = {
    version: partial(swin_transformer.SwinTransformer, attention, 4, 16, (2, 2), (2, 4), stochastic_depth=0.3)
    for version, attention in ((1, WindowAttention), (2, WindowAttentionV2))
}
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
    "narrow_mobilenet_v2": Narrow(
        mobilenetv2.FAMILY, partial(mobilenetv2.MobileNetV2, MOBILENETV2),
        partial(torch_mobilenetv2.MobileNetV2, inverted_residual_setting=[[1, 16, 1, 1], [2, 24, 2, 2]]),
    ),
    "narrow_mobilenet_v3": Narrow(
        mobilenetv3.FAMILY, partial(mobilenetv3.MobileNetV3, MOBILENETV3, 32), torch_narrow_mobilenet_v3
    ),
    "narrow_efficientnet": Narrow(
        efficientnet.FAMILY, partial(efficientnet.EfficientNet, 16, EFFICIENTNET, 32, dropout=0.2),
        partial(torch_narrow_efficientnet, version=1),
    ),
    "narrow_efficientnet_v2": Narrow(
        efficientnet.FAMILY, partial(efficientnet.EfficientNet, 16, EFFICIENTNETV2, 32, dropout=0.2, epsilon=1e-3),
        partial(torch_narrow_efficientnet, version=2),
    ),
    "narrow_regnet_x": Narrow(
        regnet.FAMILY, partial(regnet.RegNet, REGNET_STAGES, 8), partial(torch_narrow_regnet, squeeze=0.0)
    ),
    "narrow_regnet_y": Narrow(
        regnet.FAMILY, partial(regnet.RegNet, REGNET_STAGES, 8, 0.25), partial(torch_narrow_regnet, squeeze=0.25)
    ),
    "narrow_densenet": Narrow(densenet.FAMILY, partial(densenet.DenseNet, (2, 1), 8, 16), torch_narrow_densenet),
    "narrow_convnext": Narrow(
        convnext.FAMILY, partial(convnext.ConvNeXt, (16, 32), (1, 2), stochastic_depth=0.3), torch_narrow_convnext
    ),
    "narrow_vit": Narrow(
        vision_transformer.FAMILY, partial(vision_transformer.VisionTransformer, 8, 16, 2, 2, 32, dropout=0.1),
        torch_narrow_vit,
    ),
    "narrow_swin": Narrow(swin_transformer.FAMILY, SWINS[1], partial(torch_narrow_swin, version=1)),
    "narrow_swin_v2": Narrow(swin_transformer.FAMILY, SWINS[2], partial(torch_narrow_swin, version=2)),
    "narrow_shufflenet_v2": Narrow(
        shufflenetv2.FAMILY, partial(shufflenetv2.ShuffleNetV2, (2, 1, 1), (8, 16, 24, 32, 48)),
        lambda num_classes: torch_shufflenetv2.ShuffleNetV2([2, 1, 1], [8, 16, 24, 32, 48], num_classes),
    ),
}  # fmt: skip


def _constants(narrow: Narrow, arch: str) -> Mapping[str, np.ndarray]:
    """torch's tensors that are no variables, which a family finds by the name of one of its own architectures."""
    return swin_transformer.tables(narrow.ours) if narrow.family is swin_transformer.FAMILY else {}


for _arch, _narrow in NARROW.items():
    # The family's own record, for this architecture alone.
    changed = {"architectures": {_arch: _narrow.ours}, "constants": partial(_constants, _narrow)}
    families.register(dataclasses.replace(_narrow.family, **changed))
    networks.NOT_IN_TORCHVISION[_arch] = _narrow.torchs
