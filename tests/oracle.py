"""torchvision's models, also those that torchvision has no name for."""

from __future__ import annotations

import numpy as np
import torch
import torchvision

from convert import names
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.family import variable_shapes

# All architectures of torchvision's, and a small one of each family and of what is special in it.
ALL = tuple(arch for arch in ARCHITECTURES if arch in torchvision.models.list_models())
ONE_EACH = (
    "resnet18", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "densenet121",
    "convnext_tiny", "vit_b_32", "swin_t", "swin_v2_t", "shufflenet_v2_x0_5",
)  # fmt: skip
LIGHT = ("resnet18", "resnext50_32x4d", "mobilenet_v3_small", "regnet_y_400mf", "swin_v2_t")  # 30 million at most


def torch_model(arch: str, num_classes: int = 10, seed: int = 0) -> torch.nn.Module:
    """torchvision's own initialisation, with batch norm's state and parameters moved off their trivial values."""
    torch.manual_seed(seed)
    model = getattr(torchvision.models, arch)(num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return model


def unfilled(arch: str) -> torch.nn.Module:
    """torchvision's network without numbers, where it can be had so: RegNet's widths are worked out by torch itself."""
    try:
        with torch.device("meta"):
            return torchvision.models.get_model(arch)
    except NotImplementedError:
        return torchvision.models.get_model(arch)


def tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state_dict as arrays."""
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def ported(model: torch.nn.Module, arch: str, num_classes: int = 10):
    """Our model with the same weights: (model, variables)."""
    ours = ARCHITECTURES[arch](num_classes=num_classes)
    return ours, names.to_flax(tensors(model), variable_shapes(ours), arch)
