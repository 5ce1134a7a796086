"""torchvision's networks as the comparison wants them: every value shows in the result, and every draw is ours.

torchvision's own initial values hide much. Layer scales of 1e-6 switch ConvNeXt's blocks off, ViT's head of zeros all
of it, and of MobileNetV3's logits the image decides 3e-10, for its depthwise kernels are drawn so small that batch norm
divides by its epsilon. A port with an error there would pass. So `build` moves such values (`stir`), takes the running
statistics from images, without which sixteen gates of EfficientNet leave 1e-5 of the image (`fit_statistics`), and
`compare` asserts that the logits depend on the image and the loss on every parameter. What is replaced besides:

- `nn.Hardsigmoid`, whose backward pass multiplies by a float32 1/6 even in float64 (0.1666666716, off by 3e-8);
- dropout and stochastic depth, which take our masks instead of drawing their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.efficientnet import FusedMBConv, MBConv
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.mobilenetv3 import InvertedResidual as InvertedResidualV3
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth

from convert import reference
from convert.reference import torch_network

SIDE = 64  # px of the images that running statistics are taken from
NOT_IN_TORCHVISION = reference.NOT_IN_TORCHVISION
Masks = Mapping[str, tuple[np.ndarray, ...]]  # torch's name of a module -> what each of its calls keeps, bool

# The last norm of a residual branch, where its block adds the branch to a shortcut.
LAST_NORM: dict[type[nn.Module], Callable[[Any], nn.Module | None]] = {
    BasicBlock: lambda block: block.bn2,
    Bottleneck: lambda block: block.bn3,
    InvertedResidual: lambda block: block.conv[-1] if block.use_res_connect else None,
    InvertedResidualV3: lambda block: block.block[-1][1] if block.use_res_connect else None,
    MBConv: lambda block: block.block[-1][1] if block.use_res_connect else None,
    FusedMBConv: lambda block: block.block[-1][1] if block.use_res_connect else None,
    ResBottleneckBlock: lambda block: block.f.c[1],
}
# Parameters that are no module's weight or bias, by the last part of their name: how they are drawn.
OWN: dict[str, Callable[[torch.Tensor], Any]] = {
    "layer_scale": lambda p: p.uniform_(0.1, 1.0),
    "logit_scale": lambda p: p.uniform_(0.0, 2.0),
    "in_proj_weight": lambda p: p.normal_(0, p.shape[1] ** -0.5),
    "in_proj_bias": lambda p: p.normal_(0, 0.1),
    "class_token": lambda p: p.normal_(0, 0.5),
    "pos_embedding": lambda p: p.normal_(0, 0.5),
    "relative_position_bias_table": lambda p: p.normal_(0, 0.5),
}


class HardSigmoid(nn.Module):
    """`nn.Hardsigmoid` whose gradient is exact in float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 3).clamp(0, 6) / 6


class Handed(nn.Module):
    """Dropout or stochastic depth by masks from elsewhere: what is kept is divided by 1 - p."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.masks: list[torch.Tensor] = []  # of the calls to come

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.masks.pop(0) / (1 - self.p) if self.training else x


def hand(model: nn.Module, masks: Masks) -> None:
    """Give a network what its next pass in training keeps."""
    for name, module in model.named_modules():
        if isinstance(module, Handed):
            module.masks = [torch.from_numpy(mask.copy()) for mask in masks.get(name, ())]


def build(arch: str, num_classes: int, seed: int = 0, image_size: int = 224) -> nn.Module:
    """torchvision's model with values that show, its draws to be handed in.

    Args:
      arch: one of torchvision's, or of NOT_IN_TORCHVISION.
      num_classes: of its head.
      seed: of all values.
      image_size: px, which a vision transformer is made for.

    Raises:
      UserError: torchvision has no such model.
    """
    torch.manual_seed(seed)
    model = torch_network(arch, num_classes, image_size)
    replace(model, nn.Hardsigmoid, lambda module: HardSigmoid())
    for kind in (nn.Dropout, StochasticDepth):
        replace(model, kind, lambda module: Handed(module.p) if module.p else module)
    stir(model)
    fit_statistics(model)
    return model


def replace(model: nn.Module, kind: type[nn.Module], by: Callable[[Any], nn.Module]) -> None:
    """Put other modules in the place of those of one kind."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, by(child))


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Draw every value so that it shows in the logits, whatever the number of layers after it."""
    small = {LAST_NORM[type(block)](block) for block in model.modules() if type(block) in LAST_NORM}
    bent = any(isinstance(module, nn.ReLU6) for module in model.modules())  # some values lie beyond its upper bend
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # The last one of a block is small, as after training: a deep network of fresh full-size blocks is chaotic,
            # torch's own float32 then leaves its own float64 by 8 % of the loss within five steps of a ResNet-50.
            nn.init.uniform_(module.weight, *((0.0, 0.1) if module in small else (0.5, 1.0)))
            # Above zero, or each ReLU takes more from what tells two images apart than from a rounding, a fifth at
            # every layer: torch's own float32 then leaves its own float64 by 2e-5 of ShuffleNet's logits.
            # But not that of a block's last, or the shortcut's mean grows over its deviation from block to block.
            nn.init.normal_(module.bias, 0.0 if module in small else 0.75, 0.1)
            if bent and module not in small:
                module.bias[0] = 6.0
        elif isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            nonlinearity = "relu" if isinstance(module, nn.Conv2d) else "linear"
            nn.init.kaiming_normal_(module.weight, nonlinearity=nonlinearity)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                OWN[name](parameter)
    # One head lies above its clamp, ln 100. With one in each of Swin V2's twelve blocks torch's own float64 runs part
    # by a factor of 60 at every update.
    for scale in [p for name, p in model.named_parameters() if name.endswith("logit_scale")][:1]:
        scale[0] = 5.0


@torch.no_grad()
def fit_statistics(model: nn.Module) -> None:
    """Make the running statistics nearly those of random images, off by what tells a wrong one from a right one."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momentum = {norm: norm.momentum for norm in norms}
    model.eval()
    for norm in norms:
        norm.train().momentum = 1.0
    model(torch.randn(8, 3, SIDE, SIDE))
    model.train()
    for norm in norms:
        norm.momentum = momentum[norm]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)
        norm.num_batches_tracked.fill_(7)
