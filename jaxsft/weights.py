"""Ported weights on disk: an Orbax directory and the `model.json` that says where they came from.

    DIR/weights/     Orbax: {"params": ..., "batch_stats": ...}
    DIR/model.json   ModelCard

`python -m convert to-flax` writes such directories, `port` makes one in the user's cache for training, and the workdir
of a run carries a `model.json` of the same form.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import platformdirs

from jaxsft.cli import UserError, local_path, nearest, run_module, warn
from jaxsft.models.resnet import ARCHITECTURES, variable_shapes

CARD = "model.json"
MOST_CLASSES = 1_000_000  # a head of 2 GB on 512 features
HEAD = "fc"
SAMPLE = Path(__file__).parent / "data" / "sample" / "resnet10_w16.safetensors"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What turns a decoded RGB image into the model's input, in evaluation.

    The short side is resized to `resize_size` px (bilinear, antialiased), the middle `crop_size` x `crop_size` px are
    cut out, and (x / 255 - mean) / std is taken per channel.
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
    num_classes: int  # 0: the weights have no head
    class_names: tuple[str, ...] | None = None
    source: str = ""  # file name, registry name, or the run that made it
    sha256: str = ""  # of the source file
    weights_version: str = ""  # torchvision's, such as IMAGENET1K_V2
    preprocessing: Preprocessing = Preprocessing()
    class_order: str = "text"  # of the folders or lists that the class names come from: 'text' | 'numeric'

    @property
    def names(self) -> tuple[str, ...]:
        """What to call the classes: their names, or their numbers where they have none."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    def save(self, directory: Path) -> None:
        """Write `directory`/model.json, whole or not at all."""
        partial = directory / (CARD + ".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        partial.replace(directory / CARD)

    @classmethod
    def load(cls, directory: Path) -> ModelCard:
        """Read and check `directory`/model.json.

        Raises:
          UserError: it is missing, not JSON, or its fields are not what this class declares.
        """
        path = directory / CARD
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            steps: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in fields["preprocessing"].items()
            }
            fields["preprocessing"] = Preprocessing(**steps)
            names = fields["class_names"]
            if not isinstance(names, list | None):
                raise ValueError(f"class_names is a {type(names).__name__}")
            card = cls(**{**fields, "class_names": None if names is None else tuple(names)})
            card.check()
        except OSError:
            raise UserError(f"{path} can't be read", "make the directory with `python -m convert to-flax`") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise UserError(f"{path} is not a model card: {error}", "port the weights again") from None
        return card

    def check(self) -> None:
        """Raise ValueError where a field can't be what it stands for."""
        p = self.preprocessing
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"unknown arch {self.arch!r}; {nearest(str(self.arch), list(ARCHITECTURES))}")
        if type(self.num_classes) is not int or not 0 <= self.num_classes <= MOST_CLASSES:
            raise ValueError(f"num_classes is {self.num_classes!r}")
        texts = (self.source, self.sha256, self.weights_version, self.class_order, *(self.class_names or ()))
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("its names, source, sha256, weights_version and class_order are text")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        if not all(type(size) is int and 0 < size <= 4096 for size in (p.resize_size, p.crop_size)):
            raise ValueError(f"sizes {p.resize_size!r}, {p.crop_size!r}")
        if any(len(v) != 3 or not all(isinstance(x, int | float) and abs(x) < 1e6 for x in v) for v in (p.mean, p.std)):
            raise ValueError("mean and std are three numbers each")
        if min(p.std) <= 0:
            raise ValueError(f"std is {p.std}, it must be above 0")
        if p.interpolation != "bilinear":
            raise ValueError(f"interpolation {p.interpolation!r}, only bilinear is known")


def save(directory: Path, variables: dict[str, Any], card: ModelCard) -> None:
    """Write variables and card as a new directory, which appears whole or not at all.

    Raises:
      UserError: `directory` exists and is not empty, or can't be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists", "name another directory or remove it")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent.resolve()))
    except OSError as error:
        raise UserError(f"{directory} can't be written: {error.strerror}", "name another directory") from None
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / "weights", variables)
        card.save(partial)
        partial.chmod(0o755)
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def load(directory: Path) -> tuple[dict[str, Any], ModelCard]:
    """Read a ported directory: variables as numpy-backed arrays on the default device, and the card.

    Raises:
      UserError: it is not one, or its arrays are not those of the card's architecture.
    """
    card = ModelCard.load(directory)
    shapes = shapes_of(card)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore((directory / "weights").resolve(), target), card
    except Exception as error:  # on damaged files the libraries below raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"the weights in {directory} can't be read: {reason}", "port them again") from None


def shapes_of(card: ModelCard) -> dict[str, Any]:
    """Shapes and dtypes of the variables that go with a card; of weights without a head, without one."""
    shapes = variable_shapes(ARCHITECTURES[card.arch](num_classes=card.num_classes or 1))
    if not card.num_classes:
        del shapes["params"][HEAD]
    return shapes


def cache_dir() -> Path:
    """The user's cache directory of this program ($XDG_CACHE_HOME/jaxsft on Linux)."""
    return Path(platformdirs.user_cache_dir("jaxsft"))


def is_registry_name(weights: str) -> bool:
    """Whether `weights` is written as torchvision names its own: IMAGENET1K_V1, ResNet18_Weights.DEFAULT, any case."""
    return re.fullmatch(r"(\w+_weights\.)?\w+", weights, re.IGNORECASE) is not None


def load_or_port(weights: str, arch: str) -> tuple[dict[str, Any], ModelCard]:
    """The variables and card of `weights`, as `port` and `load` have them.

    A port in the cache that is damaged is made anew; where the cache can't be written the port is made elsewhere and
    not kept.

    Raises:
      UserError: as `port` and `load`.
    """
    try:
        directory = port(weights, arch)
    except CacheError as error:
        warn(f"{error}: the weights are ported for this run alone")
        with tempfile.TemporaryDirectory(prefix="jaxsft-") as place:
            return load(port(weights, arch, Path(place)))
    try:
        return load(directory)
    except UserError:
        if cache_dir() not in directory.parents:
            raise
        warn(f"the ported weights {directory} are damaged: they are ported anew")
        shutil.rmtree(directory, ignore_errors=True)
        return load(port(weights, arch))


class CacheError(Exception):
    """The user's cache can't be written."""


def port(weights: str, arch: str, cache: Path | None = None) -> Path:
    """The ported directory of `weights`: itself where it is one, else converted once into the user's cache.

    Conversion runs as `python -m convert to-flax` in a process of its own, on the CPU: torch never enters this one,
    and an accelerator that admits one process is left alone.

    Args:
      weights: "sample", a registry name such as IMAGENET1K_V1, a .pth or .safetensors file, or a ported directory.
      arch: the architecture they must be of.
      cache: another folder than the user's.

    Raises:
      CacheError: the cache can't be written.
      UserError: what the conversion says, or a directory of another architecture.
    """
    path = SAMPLE if weights == "sample" else local_path(weights)
    if path.is_dir():
        found = ModelCard.load(path).arch
        if found != arch:
            raise UserError(f"{weights} holds a {found}, not a {arch}", f"set --config.model.arch={found}")
        return path
    is_name = not path.exists() and is_registry_name(weights)
    source = weights if is_name else str(path)
    key = source.rpartition(".")[2].lower() if is_name else file_sha256(path)[:16] if path.exists() else path.name
    target = (cache or cache_dir()) / "ported" / f"{arch}-{key}"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise CacheError(f"the cache {target.parent} can't be written: {error.strerror}") from None
    try:
        run_module("convert", "to-flax", source, "--arch", arch, "--out", str(target))
    except UserError:
        if not target.exists():  # else another process of this machine was faster
            raise
    return target


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
