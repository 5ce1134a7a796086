"""Files of weights, whatever they are called: what torch.save wrote, without running its code, and .safetensors."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsft.cli import UserError

NEEDS_TORCH = "install the extra: pip install 'jaxsft[torch]'"
TORCH, SAFETENSORS = "PyTorch", ".safetensors"
ENDINGS = {".safetensors": SAFETENSORS, ".pth": TORCH, ".pt": TORCH}  # asked where the content says nothing
MOST_PACKED = 10  # times: no trained numbers pack as well
ADVICE = re.compile(r"weights_only|safe_globals|trust|load failed")  # torch's: how to run the file's code nevertheless


class Placeholder:
    """Stands for an object that lies beside the weights, such as a script's arguments: takes anything, is nothing."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# What scripts save with their weights. Each is replaced by a Placeholder of the same name: none of this code ever runs.
HARMLESS = tuple(
    type(name, (Placeholder,), {"__module__": module})
    for module, names in (
        ("argparse", ("Namespace",)),
        ("types", ("SimpleNamespace",)),
        ("datetime", ("datetime", "date", "timedelta")),
        ("pathlib", ("Path", "PosixPath", "WindowsPath")),
        ("pathlib._local", ("Path", "PosixPath", "WindowsPath")),
        ("numpy", ("dtype", "ndarray")),
        ("numpy.core.multiarray", ("scalar", "_reconstruct")),
        ("numpy._core.multiarray", ("scalar", "_reconstruct")),
    )
    for name in names
)


def read(path: Path) -> dict[str, Any]:
    """What is in a file: torch tensors and what else lies there, or arrays by name from .safetensors.

    Raises:
      UserError: it is no such file, is damaged, or wants code to be run.
    """
    return {TORCH: read_torch, SAFETENSORS: read_safetensors}[kind_of(path)](path)


def kind_of(path: Path) -> str:
    """What wrote the file, by its first bytes: TORCH (a zip or a pickle) or SAFETENSORS (a length, then JSON).

    A file that is neither, but is called one of them, is so damaged: its reader says how.

    Raises:
      UserError: it can't be read, or is neither.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}", "name a file of weights") from None
    if start.startswith(b"PK"):
        return TORCH
    if start[8:] == b"{":
        return SAFETENSORS
    kind = TORCH if start.startswith(b"\x80") else ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path} is no known kind of file", f"give one of {', '.join(ENDINGS)}")
    return kind


def read_safetensors(path: Path) -> dict[str, Any]:
    """All tensors of a .safetensors file; the library holds the header against the file's length."""
    import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
    import safetensors

    try:
        with safetensors.safe_open(path, "numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            odd = next((name for name, kind in kinds.items() if re.match(r"F[468]", kind) and kind != "F64"), None)
            tensors = {} if odd else {name: file.get_tensor(name) for name in kinds}
        with path.open("rb") as raw:
            header = raw.read(int.from_bytes(raw.read(8), "little"))
        names = Counter(name for name, _ in json.loads(header, object_pairs_hook=list))
    except Exception as error:  # a damaged header makes the library and numpy raise nearly anything
        raise UserError(
            f"{path} is not a whole .safetensors file: {reason(error)}", "fetch or write it again"
        ) from None
    if odd is not None:
        raise UserError(f"{path}: {odd!r} holds {kinds[odd]}", "write it as F32")
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(f"{path} holds {twice[0]!r} twice", "write it again")
    return tensors


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
        check_records(path)
        # Warned is of odd pickles, which are refused anyway. Opened here: of a path torch would look at the ending.
        with (
            path.open("rb") as file,
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals(list(HARMLESS)),
        ):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch raise nearly anything
        if type(error).__name__ == "UnpicklingError" or ADVICE.search(str(error)):
            what, what_to_do = "refused, it is damaged or holds more than weights", "save its state_dict() alone"
        else:
            what, what_to_do = "not a whole PyTorch file", "fetch or write it again"
        raise UserError(f"{path} is {what}: {reason(error)}", what_to_do) from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state_dict", "save its state_dict() alone")
    return loaded


def check_records(path: Path) -> None:
    """Raise ValueError where a zip's records unpack to many times its size: torch itself packs none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            size = sum(entry.file_size for entry in file.infolist())
        if size > MOST_PACKED * os.path.getsize(path):
            raise ValueError(f"its records would unpack to {size:,} bytes")


def reason(error: Exception) -> str:
    """What another library says is wrong: one sentence, without the advice how to run the file's code."""
    text = str(error)
    if asked := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {asked[1][:200]}"
    if "TorchScript" in text:
        return "it is a TorchScript archive"
    sentences = re.split(r"(?<=\.)\s|\n", text.partition("WeightsUnpickler error:")[2] or text)
    said = (sentence.strip() for sentence in sentences if not ADVICE.search(sentence))
    return next(filter(None, said), type(error).__name__)[:200]


def write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of torch's as .pth, or arrays as .safetensors.

    Both libraries have words of their own for a disk that is full; made in memory and then written, it is an OSError.

    Args:
      path: of a file to be written, whose ending says which it is.
      tensors: by name.
      metadata: of .safetensors.

    Raises:
      UserError: PyTorch is not installed, and a .pth is wanted.
      OSError: it can't be written.
    """
    if path.suffix == SAFETENSORS:
        from safetensors.numpy import save

        content = save(dict(tensors), dict(metadata) if metadata else None)
    else:
        made = io.BytesIO()
        import_torch().save(tensors, made)
        content = made.getvalue()
    path.write_bytes(content)
