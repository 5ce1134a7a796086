"""What is on pictures: files, folders of them or images in memory, prepared as evaluation prepares them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image

from jaxsft import cli, storage
from jaxsft.buckets import BucketPath
from jaxsft.data import decode, listing
from jaxsft.data.augment import normalise
from jaxsft.data.base import Image, Options
from jaxsft.data.folder import EXTENSIONS, images
from jaxsft.data.threads import in_order
from jaxsft.models.precision import with_products
from jaxsft.models.weights import Preprocessing
from jaxsft.run.saved import Run
from jaxsft.storage import Location

BATCH = 32  # images a step at most
Picture = Location | Image  # a file, or an image in memory


def find_images(paths: Sequence[Location]) -> list[Location]:
    """The files named, and the images in the folders named, in their order and each once.

    Raises:
      UserError: a path does not exist, or there is nothing to look at.
    """
    found: dict[Location, None] = {}
    for path in paths:
        try:
            if path.is_dir():
                listing.read(path)
                found.update(dict.fromkeys(map(storage.location, images(path, Options(on_error="skip")))))
                continue
            path.stat()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise cli.UserError(f"{path} can't be read: {reason}", "name images or folders of images") from None
        found[path] = None
    if not found:
        raise cli.UserError(
            f"no image in {', '.join(map(str, paths))}", f"name images or folders of {', '.join(EXTENSIONS)} files"
        )
    return list(found)


def read_image(picture: Picture, to: Preprocessing, upright: bool = True) -> np.ndarray:
    """The part of an image that the model sees, [crop_size, crop_size, 3] in 0..255, as a run's evaluation has it.

    A picture that must be made smaller is resized on 8 bits (uint8), as for training on files; else in float32, without
    rounding to whole levels, as `augment.preprocess` does on the device, which would need a program for every size. It
    is within 1e-3 levels of torchvision's on float images, by either interpolation.

    Args:
      picture: a file, an image of PIL's, or uint8 [H, W, 3].
      to: what the model needs.
      upright: turn files and PIL's images as their EXIF tag says.

    Raises:
      Unreadable: it is no image, is broken or too large.
    """
    if isinstance(picture, np.ndarray):
        picture = PIL.Image.fromarray(picture)
    if isinstance(picture, PIL.Image.Image):
        try:
            image = decode.turned_rgb(picture.copy(), upright)  # which is when a file that was opened is read
        except Exception as error:
            raise decode.unreadable(error) from None
    else:
        image = decode.read_rgb(picture, upright)
    if min(image.size) > to.resize_size:
        return decode.middle(image, to.resize_size, to.crop_size, to.interpolation)
    floats = [channel.convert("F") for channel in image.split()]
    channels = [decode.middle(channel, to.resize_size, to.crop_size, to.interpolation) for channel in floats]
    return np.clip(np.stack(channels, -1), 0, 255)  # bicubic interpolation overshoots


def batches(pictures: Sequence[Picture], to: Preprocessing, upright: bool) -> Iterator[tuple[list[str], np.ndarray]]:
    """The readable ones of `pictures`, several at a time: their names, and float32 [B, crop, crop, 3] in 0..255.

    B is one number for all, the last batch is padded. The next ones are decoded meanwhile. An image in memory is called
    by its place, such as 'image 3'.
    """

    def attempt(picture: Picture) -> np.ndarray | decode.Unreadable:
        try:
            return read_image(picture, to, upright)
        except decode.Unreadable as error:
            return error

    size = min(BATCH, 1 << (len(pictures) - 1).bit_length())
    names: list[str] = []
    batch = np.zeros((size, to.crop_size, to.crop_size, 3), np.float32)
    read = in_order(attempt, pictures, size)
    for number, (picture, image) in enumerate(zip(pictures, read, strict=True)):
        name = str(picture) if isinstance(picture, Path | BucketPath) else f"image {number}"
        if isinstance(image, decode.Unreadable):
            cli.warn(f"left out {name}: {image}")
            continue
        batch[len(names)] = image
        names.append(name)
        if len(names) == size:
            yield names, batch
            names = []
    if names:
        yield names, batch


def predict(run: Run, pictures: Sequence[Picture], topk: int) -> Iterator[dict[str, Any]]:
    """{"file", "classes": [{"class", "probability"}, ...]} of each readable picture, the most probable first.

    Of a model of several labels an image each class has a probability of its own, and "labels" names all above 0.5.

    Raises:
      UserError: the network computes no numbers.
    """
    to, names = run.card.preprocessing, run.card.names
    to_probabilities = jax.nn.sigmoid if run.card.multi_label else jax.nn.softmax

    def body(variables: Any, images: jax.Array) -> jax.Array:
        return to_probabilities(run.model.apply(variables, normalise(images, to), train=False))

    probabilities = jax.jit(with_products(body, run.config.train.matmul_precision))
    for files, batch in batches(pictures, to, run.config.data.exif_orientation):
        rows = np.asarray(probabilities(run.variables, batch))[: len(files)]
        if not np.isfinite(rows).all():
            raise cli.UserError(f"the network of step {run.step} computes no numbers", "take another --checkpoint")
        for file, row in zip(files, rows, strict=True):
            best = np.argsort(-row, kind="stable")[:topk]
            labels = {"labels": [names[i] for i in np.flatnonzero(row > 0.5)]} if run.card.multi_label else {}
            yield {"file": file, "classes": [{"class": names[i], "probability": float(row[i])} for i in best], **labels}
