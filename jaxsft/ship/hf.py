"""A tuned model as a folder that Hugging Face's hub takes for a model: model.safetensors, config.json, README.md.

timm reads the folder where it has an architecture of the same name that computes the same: the ResNets and DenseNets,
whose tensors have the same names in both, and the VGGs, whose names it turns into its own. What timm calls otherwise or
computes otherwise keeps torchvision's names, and the card says that torchvision is the library.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.models.weights import ModelCard, Preprocessing
from jaxsft.ship import state_dict
from jaxsft.ship.facts import KEY, facts

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
TIMM, TORCHVISION = "timm", "torchvision"


class Ends(NamedTuple):
    """What timm calls the first and the last layer of a network."""

    first: str
    last: str


# Architectures of torchvision's that timm has, too, and loads from these files.
IN_TIMM = {
    re.compile(r"resnet(18|34|50|101|152)|resnext(50_32x4d|101_32x8d|101_64x4d)|wide_resnet(50|101)_2"): Ends(
        "conv1", "fc"
    ),
    re.compile(r"densenet(121|161|169|201)"): Ends("features.conv0", "classifier"),
    re.compile(r"vgg(11|13|16|19)(_bn)?"): Ends("features.0", "head.fc"),
}


def write(folder: Path, variables: Mapping[str, Any], card: ModelCard, step: int) -> None:
    """Write weights and config.json into a folder; the card is the caller's.

    Args:
      folder: that exists.
      variables: {"params", "batch_stats"}.
      card: of them.
      step: of the run.

    Raises:
      OSError: it can't be written.
    """
    state_dict.write(folder / WEIGHTS, variables, card, step)
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes it its user's alone
    text = json.dumps(config(card, facts(variables, card, step)), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def library(arch: str) -> str:
    """Whose model of that name has these names of tensors, as the hub calls libraries: 'timm' or 'torchvision'."""
    return TIMM if ends(arch) else TORCHVISION


def ends(arch: str) -> Ends | None:
    """What timm calls the ends of `arch`; None: it has no such network."""
    return next((found for pattern, found in IN_TIMM.items() if pattern.fullmatch(arch)), None)


def config(card: ModelCard, said: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as timm writes it, for its own architectures and for torchvision's, and the facts under 'jaxsft'."""
    p, found = card.preprocessing, ends(card.arch)
    return {
        "architecture": card.arch,
        "num_classes": card.num_classes,
        "label_names": list(card.names),
        "pretrained_cfg": {
            "input_size": [3, p.crop_size, p.crop_size],
            "fixed_input_size": found is None,
            "interpolation": p.interpolation,
            "crop_pct": crop_share(p),
            "crop_mode": "center",
            "mean": list(p.mean),
            "std": list(p.std),
            "num_classes": card.num_classes,
            **({"first_conv": found.first, "classifier": found.last} if found else {}),
        },
        KEY: dict(said),
    }


def crop_share(to: Preprocessing) -> float:
    """timm's crop_pct: the number by which crop_size is divided, rounded down, for the side to resize to."""
    share = to.crop_size / to.resize_size
    while math.floor(to.crop_size / share) < to.resize_size:
        share = math.nextafter(share, 0)
    return share


def usage(card: ModelCard) -> str:
    """How the folder is loaded, in Markdown."""
    if library(card.arch) == TIMM:
        how = [
            "import timm",
            "",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"',
            "data = timm.data.resolve_model_data_config(model)",
            "transform = timm.data.create_transform(**data, is_training=False)",
        ]
        also = f"`torchvision.models.{card.arch}(num_classes={card.num_classes})` takes the same tensors."
    else:
        call = state_dict.network_call(card)
        how = [
            "import convert.reference" if "convert." in call else "import torchvision",
            "from safetensors.torch import load_file",
            "",
            f"model = {call}",
            f'model.load_state_dict(load_file("{WEIGHTS}"))',
        ]
        also = "The names of the tensors are those of that network: timm has none that loads them."
    program = "\n".join(how)
    return f"## How to load it\n\n```python\n{program}\n```\n\n{also}"
