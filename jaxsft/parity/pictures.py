"""The proof on a run and pictures of one's own: from the file to the class, against PIL, torchvision and its network.

The torch side does what its users write: a picture is opened by PIL as ImageFolder does it, goes through
torchvision's Resize, CenterCrop, ToTensor and Normalize as the run's card says, and through torchvision's network,
which has taken the exported weights strictly. Pictures are turned as their EXIF tag says on both sides where the run
turns them (data.exif_orientation); ImageFolder by itself never does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torchvision import transforms

from convert import checkpoints, names
from convert.reference import torchvision_model
from jaxsft import cli
from jaxsft.data import decode, loose
from jaxsft.data.augment import normalise
from jaxsft.data.threads import in_order
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.weights import ModelCard, Preprocessing
from jaxsft.parity import networks
from jaxsft.parity.oracle import nchw
from jaxsft.parity.table import PICTURES, Row, compared, held, tolerance
from jaxsft.progress import progress
from jaxsft.run.saved import Run

BATCH = 16  # pictures at a time
QUANTITIES = ("decoded pixels", "model input", "logits", "class")


class Both(NamedTuple):
    """One picture as both sides read it: pixels uint8 [H, W, 3], the levels that go to the network, torch's input."""

    pixels: tuple[np.ndarray, np.ndarray]
    levels: np.ndarray  # ours, uint8 [crop_size, crop_size, 3], which the device normalises
    input: np.ndarray  # torch's, float32 [crop_size, crop_size, 3]


def read(path: str, run: Run, transform: Callable[[Any], torch.Tensor]) -> Both | Exception:
    """A picture by both ways, or why ours can't read it."""
    to, upright = run.card.preprocessing, run.config.data.exif_orientation
    try:
        image = decode.read_rgb(path, upright)
    except decode.Unreadable as error:
        return error
    with PIL.Image.open(path) as opened:
        turned = PIL.ImageOps.exif_transpose(opened) if upright else opened
        theirs = turned.convert("RGB")
    levels = decode.middle(image, to.resize_size, to.crop_size, to.interpolation)
    wanted = transform(theirs).numpy().transpose(1, 2, 0)
    return Both((np.asarray(image), np.asarray(theirs)), levels, wanted)


def transforms_of(to: Preprocessing) -> Callable[[Any], torch.Tensor]:
    """torchvision's transforms for PIL images, as a card says."""
    mode = transforms.InterpolationMode(to.interpolation)
    steps = (transforms.Resize(to.resize_size, mode), transforms.CenterCrop(to.crop_size), transforms.ToTensor())
    return transforms.Compose([*steps, transforms.Normalize(to.mean, to.std)])


def torch_model(run: Run) -> torch.nn.Module:
    """torchvision's network with the weights of a run as they are exported: through a file, loaded strictly.

    Raises:
      UserError: torchvision has no such network.
    """
    arch, classes = run.card.arch, run.card.num_classes
    build = networks.NOT_IN_TORCHVISION.get(arch)
    model = build(classes) if build else torchvision_model(arch, classes, run.card.preprocessing.crop_size)
    with tempfile.TemporaryDirectory(prefix="jaxsft-") as folder:
        file = Path(folder) / "tuned.pth"
        checkpoints.write(file, names.to_torch(jax.device_get(run.variables), arch))
        model.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return model.eval()


def our_model(run: Run, dtype: str) -> tuple[nn.Module, Any]:
    """The run's network and its variables, parameters and arithmetic in the dtype of the comparison."""
    kind = jnp.dtype(dtype)
    model = ARCHITECTURES[run.card.arch](num_classes=run.card.num_classes, dtype=kind, param_dtype=kind)

    def cast(value: Any) -> jax.Array:
        return jnp.asarray(value, kind if np.issubdtype(np.asarray(value).dtype, np.floating) else None)

    return model, jax.tree.map(cast, jax.device_get(run.variables))


def compare(run: Run, paths: Sequence[str], dtype: str = "float32") -> list[Row]:
    """A row a picture of its decoded pixels, then those of the model's input, of the logits, of the class.

    In float32 our network has our input, as in a prediction. In float64 both networks have torch's: the inputs are
    float32 on both sides, and what is left is the network alone. To be called as `compare.compare`. Files that can't
    be read are named on stderr and have no rows.

    Raises:
      UserError: none can be read.
    """
    to, transform, theirs = run.card.preprocessing, transforms_of(run.card.preprocessing), torch_model(run)
    model, variables = our_model(run, dtype)
    theirs = theirs.double() if dtype == "float64" else theirs.float()
    ours_input = jax.jit(lambda levels: normalise(levels.astype(jnp.float32), to))
    logits = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
    found: list[tuple[str, Both]] = []
    all_rows: list[Row] = []

    def rows() -> Iterator[Row]:
        levels = np.zeros((BATCH, to.crop_size, to.crop_size, 3), np.uint8)
        levels[: len(found)] = np.stack([both.levels for _, both in found])
        wanted = np.stack([both.input for _, both in found])
        inputs = np.asarray(ours_input(levels))
        given = np.pad(wanted.astype(dtype), ((0, BATCH - len(found)), *[(0, 0)] * 3)) if dtype == "float64" else inputs
        computed = np.asarray(logits(variables, given))
        with torch.inference_mode():
            expected = theirs(nchw(wanted.astype(dtype))).numpy()
        for number, (path, both) in enumerate(found):
            of_picture = inputs[number], wanted[number], computed[number], expected[number]
            yield from picture_rows(path, both, *of_picture, run.card, dtype)

    both_ways = in_order(lambda path: read(path, run, transform), paths, BATCH)
    for path, both in progress(zip(paths, both_ways, strict=True), total=len(paths), unit="image"):
        if not isinstance(both, Both):
            cli.warn(f"left out {path}: {both}")
            continue
        found.append((path, both))
        if len(found) == BATCH:
            all_rows += rows()
            found.clear()
    if found:
        all_rows += rows()
    if not all_rows:
        raise cli.UserError(f"none of {len(paths)} images can be read", f"name {', '.join(decode.FORMATS)} files")
    return sorted(all_rows, key=lambda row: QUANTITIES.index(row.name.split("/", 2)[1]))


def picture_rows(
    path: str,
    both: Both,
    input_: np.ndarray,
    wanted: np.ndarray,
    logits: np.ndarray,
    expected: np.ndarray,
    card: ModelCard,
    dtype: str,
) -> Iterator[Row]:
    """What is compared of one picture."""
    ours, theirs = both.pixels
    yield compared(f"{PICTURES}/decoded pixels/{path}", ours, theirs, tolerance("exact", dtype))
    yield compared(f"{PICTURES}/model input/{path}", input_, wanted, tolerance("input", "float32"))
    yield compared(f"{PICTURES}/logits/{path}", logits, expected, tolerance("picture logits", dtype))
    found, right = (classes(values, card) for values in (logits, expected))
    yield held(f"{PICTURES}/class/{path}", found == right, f"{found}, torch has {right}")


def classes(logits: np.ndarray, card: ModelCard) -> str:
    """The name of the likeliest class; of several labels an image, of all above 0.5."""
    if card.multi_label:
        return ", ".join(card.names[i] for i in np.flatnonzero(logits > 0)) or "-"
    return card.names[int(logits.argmax())]


def differing_most(rows: Sequence[Row], most: int) -> list[str]:
    """The pictures that differ most in their logits, a line each, those with a failure first."""
    by_picture: dict[str, dict[str, Row]] = {}
    for row in rows:
        _, quantity, path = row.name.split("/", 2)
        by_picture.setdefault(path, {})[quantity] = row

    def badness(path: str) -> tuple[bool, float]:
        of_picture = by_picture[path]
        relative = of_picture["logits"].relative
        return not all(row.passed for row in of_picture.values()), np.inf if relative is None else relative

    def line(path: str) -> str:
        of_picture = by_picture[path]
        numbers = ((quantity, of_picture[quantity].max_abs) for quantity in QUANTITIES[:3])
        said = [f"{quantity} {'-' if value is None else f'{value:.1e}'}" for quantity, value in numbers]
        note = "" if of_picture["class"].passed else f", class {of_picture['class'].note}"
        return f"  {path}: {', '.join(said)}{note}"

    return [line(path) for path in sorted(by_picture, key=badness, reverse=True)[:most]]


def paths_of(names_: Sequence[str]) -> list[str]:
    """The files that are named, in folders, by patterns or by themselves. Raises UserError."""
    return loose.find(names_)
