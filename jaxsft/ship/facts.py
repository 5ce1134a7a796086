"""What an exported file says of itself, wherever its form has a place for it: what it is, from what, and what it takes.

The same facts under the same names in all forms: in .pth, .safetensors and .onnx as text by name, numbers and lists as
JSON, and in .stablehlo as one JSON object.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert import names
from jaxsft.models.weights import ModelCard, Preprocessing

KEY = "jaxsft"  # under which they lie where others keep things, too
BATCH = "n"  # what the number of images is called, of a program that takes any


def facts(variables: Mapping[str, Any], card: ModelCard, step: int, images: str = "") -> dict[str, Any]:
    """The facts of a model, of JSON's kinds.

    Args:
      variables: {"params", "batch_stats"}.
      card: of them.
      step: of the run.
      images: what the exported program takes, in words; '': it is none.

    Returns:
      arch; classes, their names in the order of the logits; multi_label; temperature, by which logits are divided
      before softmax (of several labels an image: sigmoid); preprocessing, the fields of
      `models.weights.Preprocessing`; images; step; sha256, `weights_sha256` of these weights; source, source_version
      and source_sha256 of those that training began with; jaxsft, the version of this program.
    """
    return {
        "arch": card.arch,
        "classes": list(card.names),
        "multi_label": card.multi_label,
        "temperature": card.temperature,
        "preprocessing": dataclasses.asdict(card.preprocessing),
        **({"images": images} if images else {}),
        "step": step,
        "sha256": weights_sha256(names.to_torch(variables, card.arch)),
        "source": card.source,
        "source_version": card.weights_version,
        "source_sha256": card.sha256,
        "jaxsft": importlib.metadata.version("jaxsft"),
    }


def taken(to: Preprocessing, image_size: tuple[int, int] | None) -> str:
    """What a program takes that divides by 255 and normalises, and perhaps resizes and crops before, in words.

    Args:
      to: what the model needs.
      image_size: (height, width) in px of the pictures that it resizes; None: they have been resized and cropped.
    """
    height, width = image_size or (to.crop_size, to.crop_size)
    done = "as they are" if image_size else f"short side resized to {to.resize_size} px, the middle cut out"
    return f"uint8 [{BATCH}, {height}, {width}, 3], RGB, {done}"


def as_text(found: Mapping[str, Any]) -> dict[str, str]:
    """Facts as text by name: text as it is, all else as JSON; ASCII but for what is text already."""
    return {name: ascii_text(value) if isinstance(value, str) else json.dumps(value) for name, value in found.items()}


def ascii_text(text: str) -> str:
    """`text`, which may be a file's name of bytes that are no UTF-8, as text that any form can hold."""
    return text.encode(errors="backslashreplace").decode()


def weights_sha256(tensors: Mapping[str, np.ndarray]) -> str:
    """The sha256 of tensors by torchvision's names, in hex, whatever file they lie in.

    It is of, in the order of the names, each one's name, its dtype and shape as numpy and JSON write them, and its
    bytes in C order, little-endian, the texts each ended by a zero byte.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        for text in (name, tensor.dtype.name, json.dumps(tensors[name].shape)):
            found.update(text.encode() + b"\0")
        found.update(tensor.tobytes())
    return found.hexdigest()
