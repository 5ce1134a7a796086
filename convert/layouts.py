"""The state_dict inside what training scripts save: which entry it is, and what its names are preceded by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxsft.cli import UserError

# Under which a script keeps the weights, beside its optimizer and its arguments; of several the first.
ENTRIES = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "weights", "model_ema")
WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and AveragedModel, of torch.compile
COMPANION = "n_averaged"  # AveragedModel's counter, beside its weights


def state_dict(loaded: Mapping[Any, Any], expected: Collection[str], path: object) -> dict[str, Any]:
    """Tensors by the model's own names, from what `torch.save` or safetensors kept.

    Args:
      loaded: a state_dict, or a dict that holds one under one of ENTRIES; of a run's weights and their moving average
        (torchvision's reference script keeps both) the weights.
      expected: the names of the model. A first component that all names share (`backbone.`) is dropped as long as
        none of them is expected.
      path: of the file, for messages.

    Raises:
      UserError: it holds no tensors, what is none among them, or two under one name.
    """
    while entry := next((e for e in ENTRIES if isinstance(loaded.get(e), Mapping)), None):
        loaded = loaded[entry]
    found: dict[str, Any] = {}
    for key, value in loaded.items():
        name = without_wrappers(str(key))
        if not hasattr(value, "dtype") or (not hasattr(value, "layout") and not hasattr(value, "__array_interface__")):
            if "." not in name:
                continue  # an epoch, an accuracy: no tensor of a network has so short a name
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor", "save a state_dict() alone")
        if name == COMPANION or ("." not in name and not getattr(value, "shape", ())):
            continue
        if name in found:
            raise UserError(f"{path} holds {name!r} twice, once as {key!r}", "save one state_dict() alone")
        found[name] = value
    if not found:
        raise UserError(f"{path} holds no tensors", "save the model's state_dict()")
    return without_shared_prefix(found, expected)


def without_wrappers(name: str) -> str:
    """`name` without what wrappers of a module put before it, in whatever order."""
    while wrapper := next((w for w in WRAPPERS if name.startswith(w)), ""):
        name = name.removeprefix(wrapper)
    return name


def without_shared_prefix(tensors: dict[str, Any], expected: Collection[str]) -> dict[str, Any]:
    """`tensors` without the first components that all names share, as long as no name is an expected one."""
    while not any(name in expected for name in tensors):
        first, dot, _ = next(iter(tensors)).partition(".")
        if not dot or not all(name.startswith(first + dot) for name in tensors):
            break
        tensors = {without_wrappers(name.removeprefix(first + dot)): value for name, value in tensors.items()}
    return tensors
