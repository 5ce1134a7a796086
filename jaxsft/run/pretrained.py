"""The weights that training starts from, whatever names them: a file, torchvision's name, a ported directory, a run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any

import jax

from jaxsft.cli import UserError, local_path, run_module, warn
from jaxsft.data import embedded
from jaxsft.models.weights import ModelCard, cache_dir, file_sha256, load
from jaxsft.run import saved


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
    path = embedded.WEIGHTS if weights == "sample" else local_path(weights)
    if not os.path.isdir(path):
        return convert(path, arch)
    found = (saved.read_card(path) if saved.is_run(path) else ModelCard.load(path)).arch
    if found != arch:
        raise UserError(f"{path} holds a {found}, not a {arch}", f"set --config.model.arch={found}")
    if not saved.is_run(path):
        return load(path)
    run = saved.read(path, checkpoint)
    source = f"{path.resolve().name} at step {run.step}"
    card = dataclasses.replace(run.card, source=source, sha256="", weights_version="")
    return jax.device_put(run.variables, jax.local_devices()[0]), card


def convert(path: Path, arch: str) -> tuple[dict[str, Any], ModelCard]:
    """A file or registry name ported: once, into the user's cache.

    Conversion runs as `python -m convert to-flax` in a process of its own, on the CPU: torch never enters this one,
    and an accelerator that admits one process is left alone. A port in the cache that is damaged is made anew; a cache
    that can't be written costs a conversion at every run.

    Raises:
      UserError: what the conversion says.
    """
    key = file_sha256(path)[:16] if os.path.isfile(path) else urllib.parse.quote(str(path).lower(), safe="")
    target = cache_dir() / "ported" / f"{arch}-{key}"
    if os.path.exists(target):
        try:
            return load(target)
        except UserError as error:
            warn(f"{error}: this is done now")
            shutil.rmtree(target, ignore_errors=True)
    with scratch(target.parent) as folder:
        made = Path(folder) / "ported"
        run_module("convert", "to-flax", str(path), "--arch", arch, "--out", str(made))
        ported = load(made)
        with contextlib.suppress(OSError):  # another process of this machine was faster, or nothing can be kept
            made.replace(target)
    return ported


def scratch(within: Path) -> tempfile.TemporaryDirectory[str]:
    """A directory that goes away again: in `within`, or where that can't be written in the system's own place."""
    try:
        within.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".", dir=within, ignore_cleanup_errors=True)
    except OSError as error:
        warn(f"{within} can't be written ({error.strerror}): the ported weights are not kept")
        return tempfile.TemporaryDirectory(prefix="jaxsft-", ignore_cleanup_errors=True)
