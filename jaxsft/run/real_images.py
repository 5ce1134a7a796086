"""Real images of a run, or others, as what it exports takes them: to hold exported files against the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image

from jaxsft import cli
from jaxsft.cli import UserError
from jaxsft.data import decode
from jaxsft.data.base import Options
from jaxsft.data.sources import open_source
from jaxsft.run.prediction import Picture, find_images, read_image
from jaxsft.run.saved import Run
from jaxsft.ship.check import Pictures
from jaxsft.storage import Location

COUNT = 16  # images that are compared on: two calls, of one and of fifteen


def real_images(run: Run, named: Sequence[Location] = (), image_size: tuple[int, int] | None = None) -> Pictures:
    """COUNT images of the split that `run` was evaluated on, evenly spread over it, or of those named.

    They are resized and cropped as evaluation does, and rounded to whole levels.

    Args:
      run: whose preprocessing.
      named: files of images, and folders of them; none: the run's own.
      image_size: (height, width) in px that they are resized to instead, whatever their shape.

    Raises:
      UserError: they can't be had, or none of them can be read.
    """
    to, upright = run.card.preprocessing, run.config.data.exif_orientation
    pictures: list[Picture] = spread(find_images(named)) if named else of_run(run)
    found: list[np.ndarray] = []
    for picture in pictures:
        try:
            if image_size is None:
                found.append(np.rint(read_image(picture, to, upright)).astype(np.uint8))
            else:
                found.append(resized(picture, image_size, upright))
        except decode.Unreadable as error:
            cli.warn(f"left out {picture if isinstance(picture, Location) else 'an image'}: {error}")
    if not found:
        raise UserError("none of the images to compare on can be read", "name others with --images")
    return Pictures(np.stack(found), image_size is None)


def of_run(run: Run) -> list[Picture]:
    """Those of the split that a run was evaluated on; broken ones are left out. Raises UserError."""
    data = run.config.data
    try:
        source = open_source(data.source, data.eval_split, Options.of(run.config))
    except UserError as error:
        what, _, what_to_do = str(error).rpartition("; ")
        raise UserError(what, f"{what_to_do}, or name images to compare on with --images") from None
    found: list[Picture] = []
    for index in spread(range(len(source))):
        try:
            found.append(source[index])
        except decode.Unreadable as error:
            cli.warn(f"left out {source.name(index)}: {error}")
    return found


def spread(things: Sequence) -> list:
    """COUNT of `things`, evenly spread over them, or all."""
    count = min(COUNT, len(things))
    return [things[len(things) * number // count] for number in range(count)]


def resized(picture: Picture, image_size: tuple[int, int], upright: bool) -> np.ndarray:
    """An image of another shape, uint8 [height, width, 3]. Raises Unreadable."""
    height, width = image_size
    if isinstance(picture, np.ndarray):
        picture = PIL.Image.fromarray(picture)
    image = picture.convert("RGB") if isinstance(picture, PIL.Image.Image) else decode.read_rgb(picture, upright)
    return np.asarray(image.resize((width, height), PIL.Image.Resampling.BILINEAR))
