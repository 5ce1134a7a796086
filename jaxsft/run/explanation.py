"""Why a saved run takes pictures for what it does: classes chosen, methods run, a batch at a time."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsft import cli, storage
from jaxsft.data import decode
from jaxsft.data.augment import normalise
from jaxsft.data.loose import Loose, Picture, is_file
from jaxsft.data.threads import in_order
from jaxsft.interpret import baseline, feature_map, gradcam, integrated_gradients, occlusion
from jaxsft.interpret.explanations import METHODS, Completeness, Explained, Explanation
from jaxsft.models.precision import with_products
from jaxsft.models.weights import Preprocessing
from jaxsft.run.prediction import read_image
from jaxsft.run.saved import Run

PREDICTED, TRUE = "predicted", "true"  # in place of a class: what the model takes it for, the folder that it lies in
ROWS = 8  # pairs of an image and a class that are explained at once
BATCH = 32  # images a step at most
CAM = "gradcam"  # what the names of methods that take a layer's map begin with
TOP = 3  # classes named of each picture


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be explained, and how."""

    methods: tuple[str, ...] = ("gradcam",)  # of METHODS
    classes: tuple[str, ...] = (PREDICTED,)  # names of classes, PREDICTED or TRUE
    layer: str = ""  # torch's name of the one whose map Grad-CAM takes; '': the last
    steps: int = integrated_gradients.STEPS
    baseline: str = "mean"  # of baseline.BASELINES
    window: int | None = None  # px that are covered at once; None: occlusion.usual_window
    stride: int | None = None  # px; None: half of the window


class Answer(NamedTuple):
    """What a method found for several pairs of an image and a class."""

    values: np.ndarray  # [N, S, S]
    completeness: tuple[Completeness | None, ...]


Method = Callable[[Any, np.ndarray, np.ndarray], Answer]  # (variables, images, classes)
ClassOf = Callable[[str, int], int]  # (name of a picture, class that it is taken for) -> class to be explained


def explain(run: Run, pictures: Sequence[Picture], asked: Asked) -> Iterator[Explained]:
    """What on each readable picture speaks for the classes asked for, by each of the methods; computed as it is read.

    Raises:
      UserError: at once, where there is no such method, class, layer, baseline or window; later, where the network
        computes no numbers.
    """
    numbers = [class_of(run, pictures, name) for name in asked.classes]
    methods, layer = prepared(run, asked)
    return explanations(run, pictures, numbers, methods, layer)


def explanations(
    run: Run, pictures: Sequence[Picture], numbers: Sequence[ClassOf], methods: Mapping[str, Method], layer: str
) -> Iterator[Explained]:
    """See `explain`."""
    to, names = run.card.preprocessing, run.card.names

    def body(variables: Any, images: jax.Array) -> jax.Array:
        return run.model.apply(variables, normalise(images, to), train=False)

    apply = jax.jit(with_products(body, run.config.train.matmul_precision))
    size = min(ROWS, 1 << (len(pictures) * len(numbers) - 1).bit_length())
    for files, batch in batches(pictures, to, run.config.data.exif_orientation):
        logits = np.asarray(apply(run.variables, batch), np.float64)[: len(files)]
        if not np.isfinite(logits).all():
            raise cli.UserError(f"the network of step {run.step} computes no numbers", "take another --checkpoint")
        predicted, shares = logits.argmax(1), probabilities(run, logits)
        classes = [[number(file, int(k)) for number in numbers] for file, k in zip(files, predicted, strict=True)]
        answers = {name: in_parts(partial(one, run.variables), batch, classes, size) for name, one in methods.items()}
        place = itertools.count()  # of a pair of an image and a class
        for row, (file, own) in enumerate(zip(files, classes, strict=True)):
            found = []
            for k, pair in zip(own, place):
                about = names[k], float(shares[row, k]), float(logits[row, k])
                for name, answer in answers.items():
                    values = answer.values[pair].astype(np.float32)
                    from_layer = layer if name.startswith(CAM) else ""
                    found.append(Explanation(name, *about, values, from_layer, answer.completeness[pair]))
            best = np.argsort(-shares[row], kind="stable")[:TOP]
            named = tuple((names[k], float(shares[row, k])) for k in best)
            yield Explained(file, batch[row].copy(), named, tuple(found))


def class_of(run: Run, pictures: Sequence[Picture], name: str) -> ClassOf:
    """How a class that is asked for follows from a picture. Raises UserError."""
    if name == PREDICTED:
        return lambda file, predicted: predicted
    if name == TRUE:
        labels = {str(picture): folder_class(run, picture) for picture in pictures}
        return lambda file, predicted: labels[file]
    number = class_number(run, name)
    return lambda file, predicted: number


def batches(pictures: Sequence[Picture], to: Preprocessing, upright: bool) -> Iterator[tuple[list[str], np.ndarray]]:
    """The readable ones of `pictures`, several at a time: their names, and uint8 [B, crop_size, crop_size, 3].

    B is one number for all, the last batch is padded. The next ones are decoded meanwhile. An image in memory is called
    by its place, such as 'image 3'.
    """

    def attempt(picture: Picture) -> np.ndarray | decode.Unreadable:
        try:
            return read_image(picture, to, upright)
        except decode.Unreadable as error:
            return error

    source = Loose(tuple(pictures))
    size = min(BATCH, 1 << (len(pictures) - 1).bit_length())
    names: list[str] = []
    batch = np.zeros((size, to.crop_size, to.crop_size, 3), np.uint8)
    for number, image in enumerate(in_order(attempt, pictures, size)):
        if isinstance(image, decode.Unreadable):
            cli.warn(f"left out {source.name(number)}: {image}")
            continue
        batch[len(names)] = image
        names.append(source.name(number))
        if len(names) == size:
            yield names, batch
            names = []
    if names:
        yield names, batch


def probabilities(run: Run, logits: np.ndarray) -> np.ndarray:
    """Of logits [N, K], each class by itself where an image has several labels: float64 [N, K]."""
    scaled = logits / run.card.temperature
    if run.card.multi_label:
        return np.exp(-np.logaddexp(0, -scaled))
    powers = np.exp(scaled - scaled.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def in_parts(step: Callable[..., Answer], images: np.ndarray, classes: Sequence[Sequence[int]], size: int) -> Answer:
    """A method for the M classes of each of N images, `size` pairs at a time: N * M values, image by image."""
    pairs = [(i, k) for i, several in enumerate(classes) for k in several]
    values: list[np.ndarray] = []
    completeness: list[Completeness | None] = []
    for first in range(0, len(pairs), size):
        part = pairs[first : first + size]
        rows, numbers = zip(*(part + part[:1] * (size - len(part))), strict=True)
        answer = step(images[list(rows)], np.array(numbers, np.int32))
        values.append(answer.values[: len(part)])
        completeness += answer.completeness[: len(part)]
    return Answer(np.concatenate(values), tuple(completeness))


def prepared(run: Run, asked: Asked) -> tuple[dict[str, Method], str]:
    """The methods asked for, ready to run, and the layer of Grad-CAM's map. Raises UserError."""
    for name in asked.methods:
        if name not in METHODS:
            raise cli.UserError(f"there is no method {name!r}", cli.nearest(name, list(METHODS)))
    if asked.baseline not in baseline.BASELINES:
        raise cli.UserError(f"there is no baseline {asked.baseline!r}", f"known: {', '.join(baseline.BASELINES)}")
    if asked.steps < 1:
        raise cli.UserError(f"integrated gradients in {asked.steps} steps can't be", "take 1 or more")
    to, precision = run.card.preprocessing, run.config.train.matmul_precision
    where = None
    if asked.layer or any(name.startswith(CAM) for name in asked.methods):
        where = feature_map.find(run.model, run.card.arch, run.variables, to.crop_size, asked.layer)
    methods: dict[str, Method] = {}
    for name in asked.methods:
        if name == "occlusion":
            methods[name] = of_values(occlusion.make(run.model, to, *windows(run, asked), asked.baseline, precision))
        elif name == "integrated_gradients":
            methods[name] = of_attributions(
                integrated_gradients.make(run.model, to, asked.steps, asked.baseline, precision)
            )
        elif where:
            step = gradcam.make(run.model, where, to, plus_plus=name == "gradcam++", matmul_precision=precision)
            methods[name] = of_values(lambda *arguments, step=step: step(*arguments)[1])
    return methods, where.layer if where else ""


def of_values(step: Callable[..., Any]) -> Method:
    """A method whose values [N, S, S] `step` computes."""

    def method(variables: Any, images: np.ndarray, classes: np.ndarray) -> Answer:
        values = np.asarray(step(variables, images, classes))
        return Answer(values, (None,) * len(values))

    return method


def of_attributions(step: Callable[..., integrated_gradients.Attributions]) -> Method:
    """Integrated gradients, summed over the channels."""

    def method(variables: Any, images: np.ndarray, classes: np.ndarray) -> Answer:
        found = jax.device_get(step(variables, images, classes))
        totals = found.values.sum((1, 2, 3), dtype=np.float64)
        changes = found.logit.astype(np.float64) - found.start
        pairs = zip(totals.tolist(), changes.tolist(), strict=True)
        return Answer(found.values.sum(-1), tuple(Completeness(*pair) for pair in pairs))

    return method


def windows(run: Run, asked: Asked) -> tuple[int, int]:
    """Window and stride of occlusion, in px of the model's input. Raises UserError."""
    size = run.card.preprocessing.crop_size
    window = asked.window if asked.window is not None else occlusion.usual_window(size)[0]
    stride = asked.stride if asked.stride is not None else max(window // 2, 1)
    try:
        occlusion.places(size, window, stride)
    except ValueError as error:
        raise cli.UserError(str(error), f"1 <= stride <= window <= {size} must hold") from None
    return window, stride


def class_number(run: Run, name: str) -> int:
    """The number of a class. Raises UserError."""
    names = run.card.names
    if name not in names:
        raise cli.UserError(f"the model has no class {name!r}", cli.nearest(name, names))
    return names.index(name)


def folder_class(run: Run, picture: Picture) -> int:
    """The number of the class that a file's folder is called. Raises UserError."""
    if not is_file(picture):
        raise cli.UserError("an image in memory has no true class", "name the class")
    remote = storage.is_remote(str(picture))
    name = str(picture).split("/")[-2] if remote else os.path.basename(os.path.dirname(os.path.abspath(str(picture))))
    if name not in run.card.names:
        what = f"{picture} lies in a folder {name!r}, which is no class of the model"
        raise cli.UserError(what, f"name a class, or {PREDICTED}; {cli.nearest(name, run.card.names)}")
    return run.card.names.index(name)
