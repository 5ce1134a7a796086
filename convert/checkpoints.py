"""Files of weights: torchvision's registry, `.pth` (weights_only) and `.safetensors`, to and from arrays by name."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import tempfile
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert import layouts, names
from convert.tensors import checked
from jaxsft.cli import OFFLINE, UserError, local_path, nearest
from jaxsft.models.resnet import ARCHITECTURES, variable_shapes
from jaxsft.weights import ModelCard, Preprocessing, file_sha256, is_registry_name

TORCH_SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin")
NEEDS_TORCH = "install the extra: pip install 'jaxsft[torch]'"


class Weights(NamedTuple):
    """Tensors by torch name, and the card that describes them."""

    tensors: dict[str, np.ndarray]
    card: ModelCard


def read(weights: str, arch: str) -> Weights:
    """Read one of torchvision's weights by name (IMAGENET1K_V1, ResNet18_Weights.DEFAULT, in any case), or a file.

    A file is known by its content, not by its ending: `torch.save`'s, or safetensors, which needs no torch. Narrow
    floats come back as float32. Weights without a head have a card of 0 classes.

    Raises:
      UserError: unknown arch or name, no network, wrong hash, or a file that is missing, damaged or not weights.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"unknown arch {arch!r}", nearest(arch, list(ARCHITECTURES)))
    path = local_path(weights)
    if not path.exists() and is_registry_name(weights):
        return read_registry(weights, arch)
    if not path.is_file():
        raise UserError(f"no file {weights}", "name a .pth or .safetensors file or one of `python -m convert list`")
    tensors = own_tensors(reader_of(path)(path), arch, path)
    return Weights(tensors, ModelCard(arch, head_classes(tensors, path), None, path.name, file_sha256(path)))


def reader_of(path: Path) -> Callable[[Path], dict[str, Any]]:
    """What reads a file, by its first bytes; by its ending where they say nothing, for that reader's complaint.

    Raises:
      UserError: it is of neither kind, or can't be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}", "name a file of weights") from None
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):  # a zip, a pickle
        return read_torch
    if start[8:9] == b"{" or path.suffix.lower() == ".safetensors":
        return read_safetensors
    if path.suffix.lower() in TORCH_SUFFIXES:
        return read_torch
    raise UserError(f"{path} is no known kind of file", "give one that torch.save wrote, or a .safetensors file")


def own_tensors(loaded: dict[str, Any], arch: str, path: Path) -> dict[str, np.ndarray]:
    """The tensors of `arch` in a loaded file by torchvision's names, each checked.

    Raises:
      UserError: as `layouts.state_dict` and `tensors.checked`.
    """
    shapes = variable_shapes(ARCHITECTURES[arch]())
    expected = {names.torch_name(flax_path)[0] for flax_path in names.flatten(shapes)}
    found = layouts.state_dict(loaded, expected, path)
    return {name: checked(name, value, path) for name, value in found.items()}


def head_classes(tensors: dict[str, np.ndarray], path: Path) -> int:
    """How many classes the head in `tensors` has, by the length of fc.bias; 0: there is no head.

    Raises:
      UserError: there is half a head.
    """
    head = {name for name in tensors if name.startswith("fc.")}
    if not head:
        return 0
    bias = tensors.get("fc.bias")
    if bias is None or bias.ndim != 1 or not bias.size:
        raise UserError(f"{path} has no whole head fc", "give the weights of a whole torchvision ResNet, or no head")
    return int(bias.size)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors file; the library checks the header against the file's length."""
    import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
    import safetensors
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except AttributeError as error:  # the library looks a dtype up in numpy: float8 is not there
        what = f"{path} holds a dtype that can't be read ({getattr(error, 'name', error)})"
        raise UserError(what, "save the weights as float32, float16 or bfloat16") from None
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a whole .safetensors file: {error}", "fetch or write it again") from None


def import_torch() -> Any:
    """The torch module, asked for only where a file or the registry needs it."""
    try:
        import torch
    except ImportError:
        raise UserError("PyTorch is not installed", NEEDS_TORCH) from None
    return torch


def plain_data() -> list[Any]:
    """What a file may name beside tensors and containers: a script's arguments, and numpy's numbers. None runs code."""
    dtypes = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"]
    scalar = np.float64(0).__reduce__()[0]  # numpy's own, wherever this version of it keeps it
    return [argparse.Namespace, scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]


def read_torch(path: Path) -> dict[str, Any]:
    """A torch.save file through `weights_only=True`: tensors and plain data, never code."""
    torch = import_torch()
    try:
        plain = torch.serialization.safe_globals(plain_data())
        with (
            warnings.catch_warnings(action="ignore"),
            plain,
            path.open("rb") as file,
        ):  # by name torch looks at the ending
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # What it names, no more: the rest of what torch says is how to run the file's code nevertheless.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {found[1]}" if found else "its content is no plain data"
        raise UserError(
            f"{path} is refused, it is damaged or holds more than weights: {reason}", "save its state_dict() alone"
        ) from None
    except Exception as error:  # on a damaged file torch raises nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a whole PyTorch file: {reason}", "fetch or write it again") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state_dict", "save its state_dict() alone")
    return loaded


def registry(arch: str) -> dict[str, Any]:
    """torchvision's weights of `arch` by name: IMAGENET1K_V1 and so on."""
    import_torch()
    from torchvision.models import get_model_weights, list_models

    if arch not in list_models():
        raise UserError(f"torchvision has no weights for {arch}", "name a .pth or .safetensors file")
    return dict(get_model_weights(arch).__members__)


def read_registry(name: str, arch: str) -> Weights:
    """Download (once, into torch's own cache) one of torchvision's weights and check its sha256."""
    known = registry(arch)
    enum, _, member = name.rpartition(".")
    if member.upper() not in known:
        raise UserError(f"{arch} has no weights {name!r}", nearest(member.upper(), list(known)))
    entry = known[member.upper()]
    if enum and enum.lower() != type(entry).__name__.lower():
        raise UserError(
            f"{name} is not of {arch}, whose weights are {type(entry).__name__}", "name the arch they are of"
        )
    torch = import_torch()
    path = download(entry.url, Path(torch.hub.get_dir()) / "checkpoints")
    preset = entry.transforms()
    card = ModelCard(
        arch,
        num_classes=len(entry.meta["categories"]),
        class_names=tuple(entry.meta["categories"]),
        source=path.name,
        sha256=file_sha256(path),
        weights_version=entry.name,
        preprocessing=Preprocessing(preset.resize_size[0], preset.crop_size[0], tuple(preset.mean), tuple(preset.std)),
    )
    return Weights(own_tensors(read_torch(path), arch, path), card)


def download(url: str, folder: Path) -> Path:
    """The file behind `url` in `folder`, fetched where absent, its sha256 checked against the hash in its name.

    torchvision names files like resnet18-f37072fd.pth, by the first eight digits. A file already there is checked too.

    Raises:
      UserError: it can't be fetched, or the hash is wrong; nothing is left behind then.
    """
    torch = import_torch()
    name = url.rsplit("/", 1)[-1]
    path = folder / name
    match = re.search(r"-([0-9a-f]{8,})\.", name)
    prefix = match.group(1) if match else ""
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), prefix, progress=os.isatty(2))
        except (urllib.error.URLError, OSError, TimeoutError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"{url} could not be fetched ({reason})", OFFLINE) from None
        except RuntimeError:  # torch's word for a hash that differs; it has removed the file
            raise UserError(f"{url} has another sha256 than its name says", "try again, or give a local file") from None
    elif not file_sha256(path).startswith(prefix):
        raise UserError(f"{path} has another sha256 than its name says", "remove it, it will be fetched again")
    return path


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write tensors by torch name as .pth (a state_dict that `load_state_dict(strict=True)` takes) or .safetensors.

    Raises:
      UserError: another suffix, the file exists, or it can't be written; nothing half-written stays.
    """
    if path.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{path} is neither .pth nor .safetensors", "give the file one of these endings")
    if path.exists():
        raise UserError(f"{path} exists", "name another file or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}", "name another file") from None
    os.close(handle)
    try:
        if path.suffix == ".pth":
            torch = import_torch()
            torch.save({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, partial)
        else:
            from safetensors.numpy import save_file

            save_file(tensors, partial)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
