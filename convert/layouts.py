"""The state_dict inside what training scripts save, and torchvision's names behind those of the wrappers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxsft.cli import UserError

# Under which keys scripts keep the state_dict. The first that is there counts: with both, the model, not its average.
HOLDERS = ("model", "state_dict", "model_state_dict", "net", "network", "module", "model_ema", "state_dict_ema", "ema")
# Modules around a model: of DataParallel and AveragedModel, torch.compile, FSDP, activation checkpointing.
WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
BESIDE = "n_averaged"  # AveragedModel's counter
DEEPEST = 8  # holders in holders


def state_dict(loaded: Mapping[str, Any], path: Path, known: Collection[str]) -> dict[str, Any]:
    """The tensors in `loaded`, the content of a file, by torchvision's names, of which some are `known`.

    Taken away are the dicts around them (`HOLDERS`), the names of wrappers wherever they stand in a name (`WRAPPERS`),
    a prefix that all names share ("model.", "backbone."), and the count that an average carries.

    Raises:
      UserError: there is no state_dict, or two of its tensors have the same name then.
    """
    for _ in range(DEEPEST):
        held = next((loaded[key] for key in HOLDERS if isinstance(loaded.get(key), Mapping)), None)
        if held is None:
            break
        loaded = held
    if not loaded:
        raise UserError(f"{path} holds no tensors", "save a state_dict() alone")
    found: dict[str, tuple[str, Any]] = {}
    for key, value in loaded.items():
        name = ".".join(part for part in str(key).split(".") if part not in WRAPPERS)
        if name == BESIDE:
            continue
        if name in found:
            raise UserError(f"{path} holds {name!r} twice: as {found[name][0]!r} and {str(key)!r}", "save it once")
        found[name] = str(key), value
    prefix = common_prefix(found, known)
    return {name.removeprefix(prefix): value for name, (_, value) in found.items()}


def common_prefix(found: Collection[str], known: Collection[str]) -> str:
    """The modules that all names of `found` begin with and names of `known` do not, such as 'model.' or ''."""
    modules, prefix = next(iter(found), "").split("."), ""
    for module in modules:
        if not all(name.startswith(prefix) for name in found):
            break
        if any(name.removeprefix(prefix) in known for name in found):
            return prefix
        prefix += f"{module}."
    return ""
