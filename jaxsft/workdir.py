"""A run's directory: config.json, model.json, metrics.jsonl, checkpoints/ and events.*"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxsft import config as config_module
from jaxsft.checkpoint import Checkpoints
from jaxsft.cli import UserError
from jaxsft.initial import init_variables, make_model
from jaxsft.models.resnet import ResNet
from jaxsft.weights import ModelCard

CONFIG = "config.json"
METRICS = "metrics.jsonl"


def check(workdir: Path, config: ConfigDict) -> None:
    """Find out before any work whether `config` can run in `workdir`; writes nothing.

    Raises:
      UserError: the directory holds a run of another config, something else, or can't be written.
    """
    existing = workdir
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{workdir} can't be written", "give another --workdir")
    path = workdir / CONFIG
    if not path.exists():
        if workdir.exists() and any(workdir.iterdir()):
            raise UserError(f"{workdir} is not empty and holds no run", "give another --workdir")
        return
    there = config_module.flatten(read_json(path))
    here = config_module.flatten(json.loads(config_module.to_json(config)))
    differing = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if differing:
        listed = ", ".join(f"{key} ({there.get(key)!r} there, {here.get(key)!r} here)" for key in differing)
        raise UserError(f"{workdir} holds a run of another config: {listed}", "give another --workdir")


def create(workdir: Path, config: ConfigDict, card: ModelCard) -> None:
    """Make the directory with its config and card, where they are not there yet."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        card.save(workdir)
        partial = workdir / (CONFIG + ".partial")
        partial.write_text(config_module.to_json(config))
        partial.replace(workdir / CONFIG)
    except OSError as error:
        raise UserError(f"{workdir} can't be written: {error.strerror}", "give another --workdir") from None


def final_record(workdir: Path) -> dict[str, Any] | None:
    """The last line of metrics.jsonl where the run is finished, else None."""
    try:
        lines = (workdir / METRICS).read_text().splitlines()
        record = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return None
    return record if record.get("final") else None


class Run(NamedTuple):
    """A run read back: what evaluate, predict and export work with."""

    config: ConfigDict
    card: ModelCard
    model: ResNet
    variables: dict[str, Any]
    step: int


def load_run(workdir: Path) -> Run:
    """The newest checkpoint of a run: the moving average where it has one.

    Raises:
      UserError: there is no run, or no checkpoint of it yet.
    """
    if not (workdir / CONFIG).exists():
        raise UserError(f"{workdir} holds no run", "give the --workdir of `python -m jaxsft.train`")
    read_json(workdir / CONFIG)
    config = config_module.from_json((workdir / CONFIG).read_text())
    card = ModelCard.load(workdir)
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest_step()
    if step is None:
        raise UserError(f"{workdir} has no checkpoint yet", "train longer")
    model = make_model(config, card.num_classes)
    variables = checkpoints.restore_variables(step, init_variables(model, 0))
    return Run(config, card, model, variables, step)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: it is none.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}", "remove the run and start it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no object", "remove the run and start it again")
    return value
