"""Weights by name or file: torchvision's registry and what was saved, to and from arrays by torchvision's names."""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.error
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert import files, layouts, names, tensors
from jaxsft import storage
from jaxsft.cli import OFFLINE, UserError, nearest
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.models.family import IMAGE_SIZE, variable_shapes
from jaxsft.models.weights import INTERPOLATIONS, MOST_CLASSES, ModelCard, Preprocessing, file_sha256
from jaxsft.storage import Location

REGISTERED = re.compile(r"(\w+_weights\.)?\w+", re.IGNORECASE)  # torchvision's enumeration and its member


class Weights(NamedTuple):
    """Tensors by torch name, and the card that describes them."""

    tensors: dict[str, np.ndarray]
    card: ModelCard


def read(weights: str, arch: str) -> Weights:
    """Read a registry name (IMAGENET1K_V1, default, ResNet18_Weights.IMAGENET1K_V1), or a file of any name.

    Tensors come back as `tensors.as_arrays` makes them; .safetensors files need no torch. Weights without a head are
    read too: their card says 0 classes.

    Raises:
      UserError: unknown arch or name, no network, wrong hash, or a file that is missing, damaged or not weights.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"unknown arch {arch!r}", nearest(arch, list(ARCHITECTURES)))
    path = storage.location(weights)
    if REGISTERED.fullmatch(weights) and not os.path.exists(weights):
        return read_registry(weights, arch)
    try:
        with storage.local_copy(path) as file:
            if not os.path.isfile(file):
                raise UserError(
                    f"no file {path}", "name a .pth or .safetensors file or one of `python -m convert list`"
                )
            found = read_file(file, arch)
            card = ModelCard(arch, head_classes(found, file, arch), None, path.name, file_sha256(file))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}", "name a .pth or .safetensors file") from None
    if (side := family_of(arch).image_size_of(found)) != IMAGE_SIZE:
        card = dataclasses.replace(card, preprocessing=Preprocessing(side, side))
    return Weights(found, card)


def read_file(path: Path, arch: str) -> dict[str, np.ndarray]:
    """The tensors of a file by torchvision's names. Raises UserError."""
    known = names.torch_names(variable_shapes(ARCHITECTURES[arch]()), arch)
    found = layouts.state_dict(files.read(path), path, known)
    return tensors.as_arrays(names.renamed(found, arch), path)


def head_classes(found: dict[str, np.ndarray], path: Path, arch: str) -> int:
    """How many classes the head of `arch` among these tensors has; 0: there is no head.

    Raises:
      UserError: it has none, or more than can be meant.
    """
    layer = family_of(arch).head
    head = [found[name] for name in (f"{layer}.bias", f"{layer}.weight") if name in found]
    if not head:
        return 0
    count = head[0].shape[0] if head[0].ndim else 0
    if not 0 < count <= MOST_CLASSES:
        raise UserError(f"{path} has a head of {count} classes", f"give the weights of a whole {arch}")
    return count


def registry(arch: str) -> dict[str, Any]:
    """torchvision's weights of `arch` by name: IMAGENET1K_V1 and so on; those of a whole network.

    vgg16's IMAGENET1K_FEATURES are not: they have no classes, and no numbers in the classifier.
    """
    files.import_torch()
    from torchvision.models import get_model_weights, list_models

    if arch not in list_models():
        raise UserError(f"torchvision has no weights for {arch}", "name a .pth or .safetensors file")
    return {name: entry for name, entry in get_model_weights(arch).__members__.items() if entry.meta["categories"]}


def read_registry(weights: str, arch: str) -> Weights:
    """Download (once, into torch's own cache) one of torchvision's weights and check its sha256.

    Raises:
      UserError: `arch` has no such weights, they want another interpolation than INTERPOLATIONS, can't be fetched, or
        are not what their name says.
    """
    known = registry(arch)
    torch = files.import_torch()
    owner, _, name = weights.upper().rpartition(".")
    from torchvision.models import get_model_weights

    if owner not in ("", get_model_weights(arch).__name__.upper()) or name not in known:
        raise UserError(f"{arch} has no weights {weights!r}", nearest(name, list(known)))
    entry = known[name]
    preprocessing = preprocessing_of(entry.transforms(), f"{arch}'s {name}")
    path = download(entry.url, Path(torch.hub.get_dir()) / "checkpoints")
    card = ModelCard(
        arch,
        num_classes=len(entry.meta["categories"]),
        class_names=tuple(entry.meta["categories"]),
        source=path.name,
        sha256=file_sha256(path),
        weights_version=entry.name,
        preprocessing=preprocessing,
    )
    return Weights(read_file(path, arch), card)


def preprocessing_of(preset: Any, whose: str) -> Preprocessing:
    """A preset of torchvision's (`transforms._presets.ImageClassification`) as ours; `whose` names it in the error.

    Raises:
      UserError: it resizes by another interpolation than INTERPOLATIONS.
    """
    interpolation = preset.interpolation.value
    if interpolation not in INTERPOLATIONS:
        what = f"{whose} weights are for images resized by {interpolation!r} interpolation"
        raise UserError(what, f"take weights for {' or '.join(INTERPOLATIONS)}")
    mean, std = tuple(preset.mean), tuple(preset.std)
    return Preprocessing(preset.resize_size[0], preset.crop_size[0], mean, std, interpolation)


def download(url: str, folder: Path) -> Path:
    """The file behind `url` in `folder`, fetched where absent, its sha256 checked against the hash in its name.

    torchvision names files like resnet18-f37072fd.pth, by the first eight digits. A file already there is checked too.

    Raises:
      UserError: it can't be fetched, or the hash is wrong; nothing is left behind then.
    """
    torch = files.import_torch()
    name = url.rsplit("/", 1)[-1]
    path = folder / name
    match = re.search(r"-([0-9a-f]{8,})\.", name)
    prefix = match.group(1) if match else ""
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), prefix, progress=os.isatty(2))
        except (urllib.error.URLError, OSError, TimeoutError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"{url} could not be fetched ({reason})", OFFLINE) from None
        except RuntimeError:  # torch's word for a hash that differs; it has removed the file
            raise UserError(f"{url} has another sha256 than its name says", "try again, or give a local file") from None
    elif not file_sha256(path).startswith(prefix):
        raise UserError(f"{path} has another sha256 than its name says", "remove it, it will be fetched again")
    return path


def write(path: Location, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays by torch name as .pth (a state_dict that `load_state_dict(strict=True)` takes) or .safetensors.

    Raises:
      UserError: another suffix, the file exists, or it can't be written; nothing half-written stays.
    """
    if path.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{path} is neither .pth nor .safetensors", "give the file one of these endings")
    with storage.new_file(path) as partial:
        if path.suffix == ".pth":
            torch = files.import_torch()
            files.write(partial, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
        else:
            files.write(partial, arrays)
