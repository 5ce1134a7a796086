"""Porting as a whole: weights to a directory of Flax's arrays, and back to a state_dict of torch's."""

from __future__ import annotations

from convert import checkpoints, names
from jaxsft import cli
from jaxsft.models import weights
from jaxsft.storage import Location


def to_flax(source: str, arch: str, out: Location) -> None:
    """Port weights to the directory `out`.

    Args:
      source: a name of torchvision's (IMAGENET1K_V1), or a file of PyTorch's or .safetensors.
      arch: the architecture that they are of.
      out: a new directory.

    Raises:
      UserError: they can't be had or do not fit, or the directory exists or can't be written.
    """
    tensors, card = checkpoints.read(source, arch)
    weights.save(out, names.to_flax(tensors, weights.shapes(card), arch), card)
    head = f"{card.num_classes} classes" if card.num_classes else "no head"
    cli.say(f"{out}: {arch}, {head}, {len(tensors)} tensors of {card.source}")


def to_torch(directory: Location, out: Location) -> None:
    """Write a ported directory as a torchvision state_dict."""
    variables, card = weights.load(directory)
    checkpoints.write(out, names.to_torch(variables, card.arch))
    if card.num_classes:
        how = f"(num_classes={card.num_classes}).load_state_dict takes it strictly"
    else:
        how = "().load_state_dict(..., strict=False) takes it, for it has no head"
    cli.say(f"{out}: torchvision.models.{card.arch}{how}")
