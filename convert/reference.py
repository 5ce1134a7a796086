"""torch's own networks, which ours are held against: torchvision's, and those that it lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from convert import files
from jaxsft.cli import UserError
from jaxsft.models.families import family_of


def torchvision_model(arch: str, num_classes: int, image_size: int) -> Any:
    """The `torch.nn.Module` of an architecture, in torchvision's initialisation.

    Args:
      arch: as torchvision calls it.
      num_classes: of its head.
      image_size: px, the side of the images that it is for; only a vision transformer's parameters depend on it.

    Raises:
      UserError: torch is not installed, or torchvision has no such architecture.
    """
    files.import_torch()
    from torchvision.models import get_model, list_models

    if arch not in list_models():
        raise UserError(f"torchvision has no {arch}", "name one of its own architectures")
    sized = {"image_size": image_size} if family_of(arch).resized else {}
    return get_model(arch, num_classes=num_classes, **sized)


def sample(num_classes: int) -> Any:
    """The network of the embedded sample."""
    files.import_torch()
    from convert.make_sample import resnet10_w16

    return resnet10_w16(num_classes)


NOT_IN_TORCHVISION: dict[str, Callable[[int], Any]] = {"resnet10_w16": sample}


def torch_network(arch: str, num_classes: int, image_size: int) -> Any:
    """`torchvision_model`, also of an architecture of NOT_IN_TORCHVISION.

    Raises:
      UserError: torch is not installed, or neither has such an architecture.
    """
    if arch in NOT_IN_TORCHVISION:
        return NOT_IN_TORCHVISION[arch](num_classes)
    return torchvision_model(arch, num_classes, image_size)


def has_network(arch: str) -> bool:
    """Whether torch has a network of that name, where torch and torchvision are installed."""
    if arch in NOT_IN_TORCHVISION:
        return True
    files.import_torch()
    from torchvision.models import list_models

    return arch in list_models()
