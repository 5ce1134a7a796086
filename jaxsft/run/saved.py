"""A run read back from its directory: its config, its card, and the variables of one of its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from jaxsft import config as config_module
from jaxsft import storage
from jaxsft.cli import UserError
from jaxsft.models import weights
from jaxsft.models.initial import make_model
from jaxsft.models.weights import ModelCard
from jaxsft.run import checkpoint
from jaxsft.run.best import Best
from jaxsft.run.parallel import cores_are_devices
from jaxsft.storage import Location

CONFIG = "config.json"


class SavedRun(NamedTuple):
    """What a run has on disk at `step`: the moving average of its variables where it keeps one."""

    config: ConfigDict
    card: ModelCard
    variables: dict[str, Any]  # {"params", "batch_stats"} of numpy arrays
    step: int


def is_run(directory: Location) -> bool:
    """Whether `directory` holds a run, finished or not.

    Raises:
      UserError: it does not say.
    """
    try:
        return (directory / CONFIG).exists() or (directory / checkpoint.FOLDER).is_dir()
    except OSError as error:
        raise UserError(f"{directory} can't be read: {error.strerror}", "name the workdir of a run") from None


def read(workdir: Location, which: str = "last") -> SavedRun:
    """A run at its newest intact checkpoint, its best, or the one of a step.

    Args:
      workdir: of the run.
      which: 'last', 'best' (by the run's checkpoint.best_metric), or a step.

    Raises:
      UserError: there is no run, or no such checkpoint of it.
    """
    if not is_run(workdir):
        raise UserError(f"{workdir} holds no run", "give the --workdir of `python -m jaxsft.train`")
    weights.check_name(workdir)
    config, card = read_config(workdir), read_card(workdir)
    shapes = weights.shapes(card)
    step = chosen_step(workdir, config, which)
    restored = checkpoint.newest(workdir, lambda record: evaluated(record, shapes), set_aside=False, only=step)
    if restored is None:
        what = f"intact checkpoint of step {step}" if step is not None else "checkpoint yet"
        raise UserError(f"{workdir} has no {what}", "name another --checkpoint" if step is not None else "train longer")
    return SavedRun(config, card, restored.state.get("average", restored.state), restored.step)


def read_config(workdir: Location) -> ConfigDict:
    """A run's config, over today's defaults.

    Raises:
      UserError: it can't be read, or has a key that is not known.
    """
    values = config_record(workdir)
    try:
        return config_module.from_json(json.dumps(values))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{workdir / CONFIG} is no config of this program: {error}"
        raise UserError(what, "use the version that wrote it") from None


def config_record(workdir: Location) -> dict[str, Any]:
    """What config.json says, or where it is damaged what the newest checkpoint does.

    Raises:
      UserError: neither can be read.
    """
    try:
        return read_json(workdir / CONFIG)
    except UserError:
        if isinstance(found := in_checkpoint(workdir, "config"), dict):
            return found
        raise


def read_card(workdir: Location) -> ModelCard:
    """A run's card: what model.json says, or where it is damaged what the newest checkpoint does.

    Raises:
      UserError: neither can be read.
    """
    try:
        return ModelCard.load(workdir)
    except UserError:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            return ModelCard.of(in_checkpoint(workdir, "card"))
        raise


def write_card(workdir: Location, card: ModelCard) -> None:
    """Let a run's model.json be `card`, whole or not at all. Raises UserError where it can't be written."""
    storage.write_file(workdir / weights.CARD, card.to_json().encode())


def in_checkpoint(workdir: Location, name: str) -> Any:
    """An entry of the host's record of the newest checkpoint whose record is whole; None where there is none."""
    for step in reversed(checkpoint.steps(workdir)):
        with contextlib.suppress(checkpoint.Damaged):
            return checkpoint.read_record(workdir / checkpoint.FOLDER / str(step)).get(name)
    return None


def chosen_step(workdir: Location, config: ConfigDict, which: str) -> int | None:
    """The step that `which` means; None: the newest.

    Raises:
      UserError: the run keeps no best, or `which` is no step.
    """
    if which == "last":
        return None
    if which.isdecimal():
        return int(which)
    if which != "best":
        raise UserError(f"--checkpoint is {which!r}", "it must be last, best or a step")
    metric = config.checkpoint.best_metric
    best = Best.of(workdir, metric).step if metric else None
    if best is None:
        raise UserError(
            f"{workdir} keeps no best checkpoint", "train with --config.checkpoint.best_metric=accuracy, or take last"
        )
    return best


def evaluated(record: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    """What `TrainState.evaluated` is in the checkpoint of `record`: the moving average where it holds one."""
    averaged = any(name.startswith("average/") for name in record["arrays"])
    return {"average": shapes} if averaged else shapes


def read_json(path: Location) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: it is none.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}", "remove the run and start it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no object", "remove the run and start it again")
    return value


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A saved run made ready to compute: what evaluate, predict and export work with."""

    workdir: Location
    config: ConfigDict
    card: ModelCard
    model: nn.Module
    variables: dict[str, Any]  # {"params", "batch_stats"} of arrays on this process's first device
    step: int


def load_run(workdir: Location, which: str = "last") -> Run:
    """A run at its newest intact checkpoint ('last'), its 'best', or the one of a step, on this process's first device.

    Raises:
      UserError: as `read`.
    """
    cores_are_devices()  # before JAX looks for devices, so that all of a CPU's cores compute, as in training
    saved = read(workdir, which)
    model = make_model(saved.config, saved.card.num_classes)
    variables = jax.device_put(saved.variables, jax.local_devices()[0])
    return Run(workdir, saved.config, saved.card, model, variables, saved.step)
