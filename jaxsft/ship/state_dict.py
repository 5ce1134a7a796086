"""A tuned model as a state_dict of torchvision's in a file, .pth or .safetensors, with its facts inside."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import files, names
from convert.reference import NOT_IN_TORCHVISION
from jaxsft.models.families import family_of
from jaxsft.models.weights import ModelCard
from jaxsft.ship.facts import KEY, as_text, facts

PTH, SAFETENSORS = ".pth", ".safetensors"
FORMAT = {"format": "pt"}  # by which Hugging Face's libraries know that tensors are PyTorch's


def write(path: Path, variables: Mapping[str, Any], card: ModelCard, step: int) -> None:
    """Write the variables under torchvision's names, and beside them their facts, as text by name.

    In .safetensors the facts are its metadata. In .pth they lie in the `_metadata` of the state_dict, where PyTorch
    keeps the versions of a network's modules by their names: under 'jaxsft', which is no module, so that
    `load_state_dict` passes over them.

    Args:
      path: of a file to be written, whose ending says which it is.
      variables: {"params", "batch_stats"}.
      card: of them.
      step: of the run.

    Raises:
      UserError: PyTorch is not installed, and a .pth is wanted.
      OSError: it can't be written.
    """
    tensors, said = names.to_torch(variables, card.arch), as_text(facts(variables, card, step))
    if path.suffix == PTH:
        torch = files.import_torch()
        found = OrderedDict((name, torch.from_numpy(tensor)) for name, tensor in tensors.items())
        found._metadata = OrderedDict({KEY: said})  # type: ignore[attr-defined]
        files.write(path, found)
    else:
        files.write(path, tensors, FORMAT | said)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file that `write` made, and its facts as text by name."""
    if path.suffix == PTH:
        found = files.import_torch().load(path, weights_only=True)
        return {name: tensor.numpy() for name, tensor in found.items()}, dict(found._metadata[KEY])
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        said = {name: text for name, text in file.metadata().items() if name not in FORMAT}
        return {name: file.get_tensor(name) for name in file.keys()}, said  # noqa: SIM118


def network_call(card: ModelCard) -> str:
    """The line of Python that makes the network of torch's which loads the file strictly."""
    sized = f", image_size={card.preprocessing.crop_size}" if family_of(card.arch).resized else ""
    if card.arch in NOT_IN_TORCHVISION:
        return f"convert.reference.torch_network({card.arch!r}, {card.num_classes}, {card.preprocessing.crop_size})"
    return f"torchvision.models.{card.arch}(num_classes={card.num_classes}{sized})"


def as_facts(said: Mapping[str, str]) -> dict[str, Any]:
    """`facts.as_text` backwards."""
    texts = ("arch", "images", "sha256", "source", "source_version", "source_sha256", KEY)
    return {name: text if name in texts else json.loads(text) for name, text in said.items()}
