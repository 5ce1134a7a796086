"""The weights that training starts from, whatever names them: a file, torchvision's name, a ported directory, a run."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxsft import storage
from jaxsft.cli import UserError, run_module, warn
from jaxsft.data import embedded
from jaxsft.models.weights import CARD, ModelCard, cache_dir, file_sha256, load
from jaxsft.run import saved
from jaxsft.storage import Location


def load_pretrained(weights: str, arch: str, checkpoint: str = "last") -> tuple[dict[str, Any], ModelCard]:
    """The variables that `weights` names, as arrays on the default device, and their card.

    Args:
      weights: "sample", a registry name such as IMAGENET1K_V1, a file of PyTorch or .safetensors, a ported directory,
        or the workdir of a run.
      arch: the architecture they must be of.
      checkpoint: which of a run's: 'last', 'best' or a step. The card then has the run and the step for its source.

    Raises:
      UserError: they can't be had, are damaged, do not fit, or are of another architecture.
    """
    path = embedded.WEIGHTS if weights == "sample" else storage.location(weights)
    try:
        is_directory = path.is_dir()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}", "name weights that can be") from None
    if not is_directory:
        return convert(path, arch)
    found = (saved.read_card(path) if saved.is_run(path) else ModelCard.load(path)).arch
    if found != arch:
        raise UserError(f"{path} holds a {found}, not a {arch}", f"set --config.model.arch={found}")
    if not saved.is_run(path):
        return load(path)
    run = saved.read(path, checkpoint)
    source = f"{(path.resolve() if isinstance(path, Path) else path).name} at step {run.step}"
    card = dataclasses.replace(run.card, source=source, sha256="", weights_version="")
    return jax.device_put(run.variables, jax.local_devices()[0]), card


def convert(path: Location, arch: str) -> tuple[dict[str, Any], ModelCard]:
    """A file or registry name ported: once, into the user's cache.

    Conversion runs as `python -m convert to-flax` in a process of its own, on the CPU: torch never enters this one,
    and an accelerator that admits one process is left alone. A port in the cache that is damaged is made anew; a cache
    that can't be written costs a conversion at every run.

    Raises:
      UserError: what the conversion says.
    """
    with contextlib.ExitStack() as stack:
        file: Path | None = None
        if not isinstance(path, Path) or path.is_file():
            try:
                file = stack.enter_context(storage.local_copy(path))
            except OSError as error:
                raise UserError(f"{path} can't be read: {error.strerror}", "name a file of weights") from None
        key = file_sha256(file)[:16] if file else urllib.parse.quote(str(path).lower(), safe="")
        target = cache_dir() / "ported" / f"{arch}-{key}"
        with contextlib.suppress(OSError):  # a cache that can't be reached
            if target.exists():
                try:
                    return load(target)
                except UserError as error:
                    warn(f"{error}: this is done now")
                    storage.remove_directory(target)
        made = stack.enter_context(scratch(target.parent)) / "ported"
        run_module("convert", "to-flax", str(file or path), "--arch", arch, "--out", str(made))
        ported = load(made)
        try:
            storage.move_directory(made, target, last=CARD)
        except OSError as error:  # another process of this machine was faster, or nothing can be kept
            if not isinstance(target, Path):
                warn(f"{target} can't be written ({error.strerror}): the ported weights are not kept")
        return ported


@contextlib.contextmanager
def scratch(within: Location) -> Iterator[Path]:
    """A directory that goes away again: in `within`, or where that can't be written in the system's own place."""
    parent: Path | None = None
    if isinstance(within, Path):
        try:
            within.mkdir(parents=True, exist_ok=True)
            storage.try_to_write(within)
            parent = within
        except OSError as error:
            warn(f"{within} can't be written ({error.strerror}): the ported weights are not kept")
    with tempfile.TemporaryDirectory(prefix=".jaxsft-", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
