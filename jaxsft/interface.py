"""The Python interface: what `import jaxsft` offers to notebooks and scripts.

    config = jaxsft.recipe("cifar10:sample")
    run = jaxsft.finetune(config, workdir="runs/a")
    run.evaluate(), run.predict("images"), run.mistakes(20), run.export("tuned.pth")
    run = jaxsft.load("runs/a")

The commands do the same, by the same functions. Nothing here ends the interpreter or reads its command line; what the
user has got wrong is a UserError.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from ml_collections import ConfigDict, FrozenConfigDict

from convert import porting
from jaxsft import cli, export, recipes, storage
from jaxsft import config as config_module
from jaxsft.buckets import BucketPath
from jaxsft.cli import UserError
from jaxsft.interpret import predictions as tables
from jaxsft.interpret.explanations import Explanations
from jaxsft.interpret.mistakes import Mistakes, mistakes
from jaxsft.interpret.multilabel import Result
from jaxsft.run import evaluation, explanation, prediction, saved, temperature, training
from jaxsft.run import workdir as workdir_module
from jaxsft.run.machine import keep_compilations
from jaxsft.storage import Location

Place = str | os.PathLike[str] | BucketPath  # also of a bucket: "gs://bucket/run"
Picture = Place | PIL.Image.Image | np.ndarray
GIVE = "give paths, images of PIL's, or arrays uint8 [H, W, 3]"


class Run(saved.Run):
    """A run, finished or not, at one of its checkpoints.

    `model` is a Flax module and `variables` its pytree, {"params", "batch_stats"}, the moving average where the run
    keeps one: `run.model.apply(run.variables, images, train=False)` takes float32 [N, H, W, 3], normalised as
    `run.card.preprocessing` says. `config`, `card` (architecture, classes, preprocessing), `step` and `workdir` tell
    the rest.
    """

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end; else `finetune` goes on with it."""
        return workdir_module.final_record(self.workdir) is not None

    def __repr__(self) -> str:
        state = "finished" if self.finished else "not finished"
        return f"<{self.card.arch} of {self.card.num_classes} classes at step {self.step}, {self.workdir}, {state}>"

    def evaluate(self, data: str = "", split: str = "", tta: str = "", predictions: Place | None = None) -> Result:
        """Evaluate on every image once: loss, accuracy, top-5, and what the result's methods say; a notebook shows it.

        `per_class_table()`, `average("macro")`, `confused(10)`, `confusion`, `calibration()`, `interval()`,
        `top_losses(10)`. Of several labels an image: loss, mean average precision, F1, the share that is right in all
        its labels.

        Args:
          data: a source as config.data.source names it; '': the run's own.
          split: such as 'test[:500]'; '': the one to evaluate on.
          tta: 'flip', 'crops' or 'flip+crops': average the probabilities over such views of each image.
          predictions: a file, .csv or .parquet, that gets a row for each image.

        Raises:
          UserError: there is no such data, it has a class that the model lacks, or the file can't be written.
        """
        to = None if predictions is None else tables.predictions_to(str(place_of(predictions)))
        return evaluation.evaluate_into(self, evaluation.open_examples(self, data, split, tta=tta), to)

    def fit_temperature(self, split: str, data: str = "") -> Run:
        """The run with the temperature that makes its probabilities fit `split` best, written into its model.json too.

        Take a split that was neither trained on nor is the one to evaluate on.

        Args:
          split: such as 'val'.
          data: as for `evaluate`.

        Raises:
          UserError: as `evaluate`, or no temperature fits.
        """
        fitted = temperature.with_fitted(self, evaluation.open_examples(self, data, split))
        temperature.write(fitted)
        return dataclasses.replace(self, card=fitted.card)

    def predict(self, images: Picture | Iterable[Picture], topk: int = 5) -> list[dict[str, Any]]:
        """The most probable classes of images.

        Args:
          images: one or several: paths of files and of folders, which are searched through; images of PIL's; arrays,
            uint8 [H, W, 3], or [N, H, W, 3] for several.
          topk: classes an image.

        Returns:
          {"file", "classes": [{"class", "probability"}, ...]} of each, of a model of several labels an image also
          "labels", the names of those above 0.5; a file that can't be read is named on stderr and left out. An image in
          memory is called by its place, such as 'image 3'.

        Raises:
          UserError: there is no such file, or what was given is no image.
        """
        if topk < 1:
            raise UserError(f"topk is {topk}", "it must be 1 or more")
        return list(prediction.predict(self, pictures_of(images), topk))

    def explain(
        self,
        images: Picture | Iterable[Picture],
        methods: str | Iterable[str] = "gradcam",
        classes: str | Iterable[str] = "predicted",
        *,
        layer: str = "",
        steps: int = 50,
        baseline: str = "mean",
        window: int | None = None,
        stride: int | None = None,
    ) -> Explanations:
        """What on images speaks for a class; a notebook shows it.

        Args:
          images: as for `predict`.
          methods: one or several of "gradcam", "gradcam++", "integrated_gradients", "occlusion".
          classes: one or several by name; "predicted": the most probable; "true": the name of the file's folder.
          layer: torch's name of the one whose map Grad-CAM takes, such as "layer3"; '': the last map of the image.
          steps: of integrated gradients.
          baseline: what they start from, and occlusion covers with: "mean" (of the training data), "black", "white".
          window: px of the model's input that occlusion covers at once; None: an eighth of its side.
          stride: px from one window to the next; None: half a window.

        Returns:
          For each image that can be read, in order: `file`, `image` uint8 [S, S, 3], `best` and `explanations`, one for
          each class and method with its `values` float32 [S, S].

        Raises:
          UserError: there is no such file, method, class, layer, baseline or window.
        """
        methods, classes = ((one,) if isinstance(one, str) else tuple(one) for one in (methods, classes))
        if not methods or not classes:
            raise UserError("no method or no class is named", 'give such as "gradcam" and "predicted"')
        asked = explanation.Asked(methods, classes, layer, steps, baseline, window, stride)
        return Explanations(explanation.explain(self, pictures_of(images), asked))

    def mistakes(self, most: int = 20, data: str = "", split: str = "") -> Mistakes:
        """The images that the model takes for something else, the surest first; a notebook shows them.

        Args:
          most: how many.
          data: as for `evaluate`; so is `split`.

        Raises:
          UserError: as `evaluate`.
        """
        examples = evaluation.open_examples(self, data, split)
        source, answers = examples.source, evaluation.evaluate_run(self, examples).answers
        return mistakes(source, answers, evaluation.names_of(self, source), most)

    def export(
        self,
        path: Place,
        form: str = "",
        *,
        preprocessing: str = "",
        image_size: tuple[int, int] | None = None,
        images: Place | Iterable[Place] = (),
    ) -> Location:
        """Write the model to a new file, compare what was written with the model, and say how it is read.

        Args:
          path: .pth or .safetensors: a state_dict of torchvision's; .stablehlo: uint8 images to logits, for any JAX;
            .onnx: images to logits, .int8.onnx the same in int8; .md: the model card; of 'hf' a new folder.
          form: 'torch', 'safetensors', 'stablehlo', 'onnx', 'int8', 'card' or 'hf'; '': as `path` ends.
          preprocessing: of onnx and int8: 'inside', it takes uint8 [n, S, S, 3], resized and cropped; '' or 'outside',
            it takes float32 [n, 3, S, S], normalised.
          image_size: (height, width) in px of pictures that stablehlo and onnx then resize and crop themselves.
          images: files and folders to compare on; none: of the run's evaluation split.

        Returns:
          `path`.

        Raises:
          UserError: it has another ending, or exists, or can't be written, or an optional package is missing.
          Stop: what was written does not agree with the model; it is gone again.
        """
        path = place_of(path)
        named = (images,) if isinstance(images, str | os.PathLike | BucketPath) else images
        how = export.How(preprocessing, image_size, tuple(map(place_of, named)))
        export.write(self, path, form, how)
        return path


def recipe(name: str | os.PathLike[str]) -> ConfigDict:
    """The config that a file makes, or a recipe that ships: to be changed, and given to `finetune`.

    Args:
      name: FILE[:VARIANT], or the recipe's name, such as "cifar10:sample" and "folder:resnet50".

    Raises:
      UserError: there is no such file, or it can't be used.
    """
    return recipes.load(os.fspath(name))


def finetune(config: ConfigDict, workdir: Place | None = None) -> Run:
    """Fine-tune as `python -m jaxsft.train` does, with the same files, and return the run.

    A run that was interrupted goes on, a finished one is returned as it is. The interpreter's Ctrl-C, a notebook's stop
    button, saves after the step and returns the run as it then is, not `finished`; before the first step it raises
    KeyboardInterrupt, and so does a second one. A SIGTERM is answered with a checkpoint, then with what it did before.
    In a thread other than the main one signals stay the program's.

    Where JAX has not started yet, each core of a CPU becomes a device, and JAX keeps compiled programs in the user's
    cache. For several hosts call `jax.distributed.initialize` first, on each.

    Args:
      config: of `recipe`, or `jaxsft.config.default()` changed; it is not changed here.
      workdir: where the run lies; None: runs/ARCH-HASH, a hash of the settings: other settings are another run.

    Raises:
      UserError: the config, the data, the weights or the directory do not allow it; found before anything is written.
      Stop: the run can't go on (a loss that is not finite, a full disk); its checkpoints stay.
    """
    config = checked(config)
    path = default_workdir(config) if workdir is None else place_of(workdir)
    workdir_module.check(path, config)
    keep_compilations()
    number = 0
    try:
        training.train(config, path, in_session=True)
    except cli.Preempted as stop:
        cli.report_error(stop)
        number = stop.number
    if number not in (0, signal.SIGINT):
        signal.raise_signal(number)
    return load(path)


def load(workdir: Place, checkpoint: str | int = "last") -> Run:
    """A run, finished or going on.

    Args:
      workdir: of `finetune` or `python -m jaxsft.train`.
      checkpoint: 'last', 'best' or a step.

    Raises:
      UserError: there is no run, or no such checkpoint of it.
    """
    loaded = saved.load_run(place_of(workdir), str(checkpoint))
    return Run(**{field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)})


def port(weights: Place, arch: str, out: Place) -> Location:
    """Port weights of torchvision's to a directory, as `python -m convert to-flax`; its path is a config.model.weights.

    Args:
      weights: a file of PyTorch's or .safetensors, or a name of torchvision's (IMAGENET1K_V1), which needs torch.
      arch: the architecture that they are of.
      out: a new directory.

    Raises:
      UserError: they can't be had or do not fit, or the directory exists or can't be written.
    """
    path = place_of(out)
    porting.to_flax(str(place_of(weights)), arch, path)
    return path


def place_of(path: Place) -> Location:
    """What a user names a file or folder by. Raises UserError."""
    return storage.location(path if isinstance(path, BucketPath) else os.fspath(path))


def checked(config: ConfigDict) -> ConfigDict:
    """A copy of a config that can be run. Raises UserError."""
    if not isinstance(config, ConfigDict):
        raise UserError(f"the config is a {type(config).__name__}", 'make one with jaxsft.recipe("cifar10:sample")')
    thawed = ConfigDict(config) if isinstance(config, FrozenConfigDict) else config
    own = thawed.copy_and_resolve_references()
    config_module.check(own)
    return own.lock()


def default_workdir(config: ConfigDict) -> Path:
    """runs/ARCH-HASH: a place for each choice of the settings that decide what a run computes."""
    settings = workdir_module.settings(config.to_dict())
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Path("runs") / f"{config.model.arch}-{digest[:8]}"


def pictures_of(images: Any) -> list[prediction.Picture]:
    """What `Run.predict` takes as a list, folders searched through. Raises UserError."""
    if isinstance(images, str | os.PathLike | BucketPath | PIL.Image.Image) or hasattr(images, "dtype"):
        images = [images]
    found: list[prediction.Picture] = []
    for image in images:
        if isinstance(image, str | os.PathLike | BucketPath):
            found += prediction.find_images([place_of(image)])
        elif isinstance(image, PIL.Image.Image):
            found.append(image)
        else:
            found += arrays_of(image)
    if not found:
        raise UserError("there is no image", GIVE)
    return found


def arrays_of(image: Any) -> list[np.ndarray]:
    """One or several images of an array uint8 [H, W, 3] or [N, H, W, 3] of any library. Raises UserError."""
    if not hasattr(image, "dtype"):
        raise UserError(f"a {type(image).__name__} is no image", GIVE)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape[-3:]:
        raise UserError(f"an array {array.dtype} {list(array.shape)} is no image", GIVE)
    return list(array.reshape(-1, *array.shape[-3:]))
