"""The model card of a run, made of what its directory holds."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from convert import names
from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.models.weights import ModelCard
from jaxsft.run import checkpoint, workdir
from jaxsft.run.log import records
from jaxsft.ship.card import FILE, Facts, model_card
from jaxsft.ship.facts import weights_sha256
from jaxsft.storage import Location

__all__ = ["FILE", "of_run"]


def of_run(
    directory: Location,
    config: ConfigDict,
    card: ModelCard,
    variables: dict[str, Any],
    step: int,
    **more: Any,
) -> str:
    """MODEL_CARD.md of a run at one of its steps.

    Args:
      directory: where the run lies; its log, the fingerprint of its data and the checkpoint of `step` are read.
      config: of the run.
      card: of its model.
      variables: of `step`, {"params", "batch_stats"}.
      step: which is described.
      more: fields of `Facts` that are to be others.
    """
    record: dict[str, Any] = {}
    with contextlib.suppress(checkpoint.Damaged):
        record = checkpoint.read_record(directory / checkpoint.FOLDER / str(step))
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(UserError):
        lines = records(directory)
    facts = Facts(
        title=directory.name,
        config=config,
        changed=changed(config),
        card=card,
        sha256=weights_sha256(names.to_torch(variables, card.arch)),
        step=step,
        data=workdir.known_data(directory) or {},
        records=lines,
        precision=str(record.get("precision", "")),
        versions=record.get("versions", {}),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])),
    )
    return model_card(facts._replace(**more))


def changed(config: ConfigDict) -> dict[str, Any]:
    """The settings of a config that are not the defaults, by their names."""
    here, defaults = (
        config_module.flatten(json.loads(config_module.to_json(c))) for c in (config, config_module.default())
    )
    flat = config_module.flatten(config.to_dict())
    return {name: flat[name] for name, value in here.items() if defaults.get(name) != value}
