"""torchvision's own networks, which ours are held against."""

from __future__ import annotations

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
