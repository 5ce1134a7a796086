"""Files of weights: torchvision's registry, `.pth` (weights_only) and `.safetensors`, to and from arrays by name."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
import urllib.error
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsft.cli import OFFLINE, UserError, nearest
from jaxsft.models.resnet import ARCHITECTURES
from jaxsft.weights import ModelCard, Preprocessing, file_sha256

TORCH_SUFFIXES = (".pth", ".pt")
NEEDS_TORCH = "install the extra: pip install 'jaxsft[torch]'"


class Weights(NamedTuple):
    """Tensors by torch name, and the card that describes them."""

    tensors: dict[str, np.ndarray]
    card: ModelCard


def read(weights: str, arch: str) -> Weights:
    """Read a registry name (IMAGENET1K_V1, DEFAULT), a .pth/.pt or a .safetensors file.

    Half-precision tensors come back as float32; .safetensors files need no torch.

    Raises:
      UserError: unknown arch or name, no network, wrong hash, or a file that is missing, damaged or not weights.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"unknown arch {arch!r}", nearest(arch, list(ARCHITECTURES)))
    path = Path(weights).expanduser()
    if not path.suffix and not path.exists():
        return read_registry(weights, arch)
    if not path.is_file():
        raise UserError(f"no file {weights}", "name a .pth or .safetensors file or one of `python -m convert list`")
    readers: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
        ".safetensors": read_safetensors,
        **dict.fromkeys(TORCH_SUFFIXES, read_torch),
    }
    if path.suffix not in readers:
        raise UserError(f"{weights} is no known kind of file", f"give one of {', '.join(readers)}")
    tensors = unwrap(readers[path.suffix](path), path)
    return Weights(tensors, ModelCard(arch, head_classes(tensors, path), None, path.name, file_sha256(path)))


def head_classes(tensors: dict[str, np.ndarray], path: Path) -> int:
    """How many classes the head in `tensors` has, by the length of fc.bias.

    Raises:
      UserError: there is no head.
    """
    bias = tensors.get("fc.bias")
    if bias is None or bias.ndim != 1 or not bias.size:
        raise UserError(f"{path} has no head fc.bias", "give the weights of a whole torchvision ResNet")
    return int(bias.size)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors file; the library checks the header against the file's length."""
    import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
    import safetensors
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a whole .safetensors file: {error}", "fetch or write it again") from None
    return {name: as_float32(tensor) for name, tensor in tensors.items()}


def as_float32(array: np.ndarray) -> np.ndarray:
    """Half precision widened; float32, float64 and integers as they are."""
    narrow = array.dtype.itemsize < 4 and array.dtype.kind not in "iub"
    return array.astype(np.float32) if narrow else array


def import_torch() -> Any:
    """The torch module, asked for only where a file or the registry needs it."""
    try:
        import torch
    except ImportError:
        raise UserError("PyTorch is not installed", NEEDS_TORCH) from None
    return torch


def read_torch(path: Path) -> dict[str, Any]:
    """A torch.save file through `weights_only=True`: tensors and plain containers, never code."""
    torch = import_torch()
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd pickles, which are refused anyway
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Only the cause: what torch says first is how to run the file's code nevertheless.
        found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        reason = found[1] if found else str(error).splitlines()[0]
        raise UserError(
            f"{path} is refused, it is damaged or holds more than weights: {reason}", "save its state_dict() alone"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a whole PyTorch file: {reason}", "fetch or write it again") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state_dict", "save its state_dict() alone")
    return loaded


def unwrap(loaded: dict[str, Any], path: Path) -> dict[str, np.ndarray]:
    """The state_dict inside what training scripts save: under "model" or "state_dict", names perhaps with "module."."""
    for key in ("model", "state_dict"):
        if isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    tensors: dict[str, np.ndarray] = {}
    for name, value in loaded.items():
        if not hasattr(value, "shape"):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor", "save a state_dict() alone")
        if not isinstance(value, np.ndarray):
            value = value.detach().to("cpu")
            value = (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()
        tensors[str(name).removeprefix("module.")] = value
    return tensors


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
    if name not in known:
        raise UserError(f"{arch} has no weights {name!r}", nearest(name, list(known)))
    entry = known[name]
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
    return Weights(unwrap(read_torch(path), path), card)


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
