"""Ported weights on disk: an Orbax directory and the `model.json` that says where they came from.

    DIR/weights/     Orbax: {"params": ..., "batch_stats": ...}, the latter where the model has any
    DIR/model.json   ModelCard

`python -m convert to-flax` writes such directories, `jaxsft.run.pretrained` makes one in the user's cache for training,
and the workdir of a run carries a `model.json` of the same form.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import platformdirs

from jaxsft import storage
from jaxsft.cli import UserError, nearest
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.models.family import variable_shapes
from jaxsft.storage import Location

CARD = "model.json"
MOST_SAID = 200  # letters of another library's or a file's own words in a message
MOST_CLASSES = 1_000_000  # a head of 2 GB on 512 features
INTERPOLATIONS = ("bilinear", "bicubic")  # of resizing


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What turns a decoded RGB image into the model's input, in evaluation.

    The short side is resized to `resize_size` px (antialiased, by `interpolation`, one of INTERPOLATIONS), the middle
    `crop_size` x `crop_size` px are cut out, and (x / 255 - mean) / std is taken per channel.
    """

    resize_size: int = 256
    crop_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a set of weights is: architecture, head, origin and preprocessing."""

    arch: str
    num_classes: int  # 0: the weights have no head, training gives them one
    class_names: tuple[str, ...] | None = None
    source: str = ""  # file name, registry name, or the run that made it
    sha256: str = ""  # of the source file
    weights_version: str = ""  # torchvision's, such as IMAGENET1K_V2
    preprocessing: Preprocessing = Preprocessing()
    class_order: str = "text"  # of the data it was trained on: 'text' | 'numeric', as config.data.class_order
    multi_label: bool = False  # whether an image has any number of labels: each class is decided on by itself
    temperature: float = 1.0  # what logits are divided by before they become probabilities, fitted by `evaluate`

    @property
    def names(self) -> tuple[str, ...]:
        """What to call the classes: their names, or their numbers where they have none."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    def save(self, directory: Path) -> None:
        """Write `directory`/model.json, whole or not at all."""
        partial = directory / (CARD + ".partial")
        partial.write_text(self.to_json())
        partial.replace(directory / CARD)

    def to_json(self) -> str:
        """What model.json holds."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, directory: Location) -> ModelCard:
        """Read and check `directory`/model.json.

        Raises:
          UserError: it is missing, not JSON, or its fields are not what this class declares.
        """
        path = directory / CARD
        try:
            return cls.of(json.loads(path.read_text()))
        except OSError as error:
            what = f"{path} can't be read: {error.strerror}"
            raise UserError(what, "make the directory with `python -m convert to-flax`") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            what = f"{path} is not a model card: {str(error)[:MOST_SAID]}"
            raise UserError(what, "port the weights again") from None

    @classmethod
    def of(cls, fields: Any) -> ModelCard:
        """The card that JSON describes. Raises ValueError, TypeError, KeyError or AttributeError where it is none."""
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["preprocessing"].items()}
        names = fields["class_names"]
        names = tuple(names) if isinstance(names, list) else names
        card = cls(**{**fields, "class_names": names, "preprocessing": Preprocessing(**lists)})
        card.check()
        return card

    def check(self) -> None:
        """Raise ValueError or TypeError where a field can't be what it stands for."""
        p = self.preprocessing
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"unknown arch {self.arch!r}; {nearest(str(self.arch), list(ARCHITECTURES))}")
        if type(self.num_classes) is not int or not 0 <= self.num_classes <= MOST_CLASSES:
            raise ValueError(f"num_classes is {self.num_classes!r}")
        names = self.class_names
        if names is not None and not (isinstance(names, tuple) and all(isinstance(name, str) for name in names)):
            raise ValueError("class_names is no list of names")
        if names is not None and len(names) != self.num_classes:
            raise ValueError(f"{len(names)} class names for {self.num_classes} classes")
        if not all(isinstance(text, str) for text in (self.source, self.sha256, self.weights_version)):
            raise ValueError("source, sha256 and weights_version are text")
        if type(self.multi_label) is not bool:
            raise ValueError(f"multi_label is {self.multi_label!r}")
        if type(self.temperature) not in (int, float) or not 0 < self.temperature < 1e6:
            raise ValueError(f"temperature is {self.temperature!r}")
        if self.class_order not in ("text", "numeric"):
            raise ValueError(f"class_order is {self.class_order!r}")
        if not all(type(size) is int and 0 < size <= 4096 for size in (p.resize_size, p.crop_size)):
            raise ValueError(f"sizes {p.resize_size!r}, {p.crop_size!r}")
        if any(len(v) != 3 or not all(type(x) in (int, float) and abs(x) < 1e6 for x in v) for v in (p.mean, p.std)):
            raise ValueError("mean and std are three numbers each")
        if min(p.std) <= 0:
            raise ValueError(f"std is {p.std}, it must be above 0")
        if p.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {p.interpolation!r}, known are {', '.join(INTERPOLATIONS)}")


def shapes(card: ModelCard) -> dict[str, Any]:
    """Shapes and dtypes of the variables that a card stands for: without the head where it has no classes."""
    model = ARCHITECTURES[card.arch](num_classes=card.num_classes or 1)
    found = variable_shapes(model, card.preprocessing.crop_size)
    if not card.num_classes:
        del found["params"][family_of(card.arch).head]
    return found


def check_name(directory: Location) -> None:
    """Raise a UserError where TensorStore and XLA can't name `directory`: their paths are UTF-8."""
    try:
        os.path.realpath(str(directory)).encode()
    except UnicodeEncodeError:
        raise UserError(f"{directory} can't be used: its path is no UTF-8", "name another directory") from None


def save(directory: Location, variables: dict[str, Any], card: ModelCard) -> None:
    """Write variables and card as a new directory, which appears whole or not at all.

    Raises:
      UserError: `directory` exists and is not empty, can't be written, or has a name that `check_name` refuses.
    """
    check_name(directory)
    with storage.new_directory(directory, last=CARD) as partial:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / "weights", variables)
        card.save(partial)


def load(directory: Location) -> tuple[dict[str, Any], ModelCard]:
    """Read a ported directory: variables as arrays on the default device, and the card.

    Raises:
      UserError: it is not one, its arrays are not those of the card, or they are not finite.
    """
    check_name(directory)
    card = ModelCard.load(directory)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes(card))
    try:
        with storage.local_copy(directory / "weights") as folder, ocp.StandardCheckpointer() as checkpointer:
            variables = checkpointer.restore(folder.resolve(), target)
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(variables)))
    except Exception as error:  # on damaged files the libraries below raise nearly anything
        said = (getattr(error, "strerror", "") or str(error).strip() or type(error).__name__)[:MOST_SAID]
        raise UserError(f"the weights in {directory} can't be read: {said}", "port them again") from None
    if not finite:
        raise UserError(f"the weights in {directory} hold NaN or infinite numbers", "port others")
    return variables, card


def cache_dir() -> Location:
    """Where this program keeps what it may need again: $JAXSFT_CACHE, also in a bucket, or the user's cache directory.

    That is $XDG_CACHE_HOME/jaxsft on Linux.
    """
    return storage.location(os.environ.get("JAXSFT_CACHE") or platformdirs.user_cache_dir("jaxsft"))


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex.

    Raises:
      UserError: it can't be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}", "name a file of weights") from None
