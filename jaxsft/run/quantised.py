"""A run in int8: calibrated on images that it was trained on, and what that costs on those it is evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.cli import UserError
from jaxsft.data.augment import normalise
from jaxsft.interpret.multilabel import Result
from jaxsft.models.weights import Preprocessing
from jaxsft.run import exported
from jaxsft.run.evaluation import open_examples
from jaxsft.run.saved import Run
from jaxsft.ship import int8, runtime
from jaxsft.ship.onnx_file import to_onnx

CALIBRATE = 512  # images; with 256 the logits of the sample's ResNet-10 were a little further from float32's

Take = Callable[[np.ndarray], np.ndarray]  # float32 [B, S, S, 3] in 0..255 -> what an ONNX file takes


class Files(NamedTuple):
    """A run as ONNX files."""

    floats: bytes  # in float32
    int8: bytes  # the same quantised
    take: Take


class Cost(NamedTuple):
    """What quantisation changes."""

    before: Result  # of the file in float32, on the images that the run is evaluated on
    after: Result
    bytes_before: int
    bytes_after: int

    @property
    def points(self) -> float:
        """How many points of accuracy, in per cent, are lost."""
        return 100 * (self.before.accuracy - self.after.accuracy)

    def __str__(self) -> str:
        sizes = (f"{size / 1e6:.2f} MB" for size in (self.bytes_before, self.bytes_after))
        results = (result.summary() for result in (self.before, self.after))
        (float_size, size), (float_result, result) = sizes, results
        return (
            f"{size}, float32 {float_size} ({self.bytes_before / self.bytes_after:.2f} times smaller); "
            f"{result}; float32 {float_result}"
        )


def onnx_files(run: Run, *, inside: bool, calibrate: int = 0) -> Files:
    """A run's ONNX file in float32 and in int8, which take the same.

    Args:
      run: whose training images calibrate the latter, the same at every call.
      inside: whether normalising is part of the graph, see `onnx_file.to_onnx`.
      calibrate: how many images, evenly spread over the training split; all where it has fewer. 0: CALIBRATE.

    Raises:
      UserError: the images can't be had, none of them can be read, the weights are no numbers, or a package is missing.
    """
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(run.variables))):
        raise UserError("the network computes no numbers", "take another --checkpoint")
    floats = to_onnx(run.variables, run.card, inside=inside, step=run.step)
    take = levels if inside else normalised(run.card.preprocessing)
    return Files(floats, int8.quantised(floats, calibrating(run, calibrate or CALIBRATE, take)), take)


def calibrating(run: Run, count: int, take: Take) -> Iterator[np.ndarray]:
    """Of `count` training images those that can be read, several at a time. Raises UserError where there are none."""
    found = 0
    for batch in exported.batches(exported.training_examples(run, count)):
        readable = batch["image"][batch["mask"]]
        found += len(readable)
        if len(readable):
            yield take(readable)
    if not found:
        raise UserError(f"none of {count} training images can be read", "calibrate on more, or mend them")


def cost(run: Run, files: Files) -> Cost:
    """Both files' metrics on the images that `run` is evaluated on, by ONNX Runtime. Raises UserError as evaluation."""
    programs = {name: running(getattr(files, name), files.take) for name in ("floats", "int8")}
    found = exported.evaluate_programs(programs, open_examples(run), run.card.multi_label)
    return Cost(found["floats"], found["int8"], len(files.floats), len(files.int8))


def running(model: bytes, take: Take) -> exported.Program:
    """An ONNX file as a program of images. Raises UserError where onnxruntime is missing."""
    program = runtime.program(model)
    return lambda images: program(take(images))


def levels(images: np.ndarray) -> np.ndarray:
    """Images in 0..255 rounded to uint8."""
    return np.rint(images).astype(np.uint8)


def normalised(to: Preprocessing) -> Take:
    """Images in 0..255 as float32 [B, 3, S, S], normalised."""
    return lambda images: np.ascontiguousarray(np.asarray(normalise(jnp.asarray(images), to)).transpose(0, 3, 1, 2))
