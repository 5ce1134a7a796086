"""Name what is on pictures: the most probable classes of each, by a checkpoint of a run.

python -m jaxsft.predict --workdir DIR IMAGE_OR_FOLDER ... [--topk 5] [--checkpoint last|best|STEP] [--json FILE]

Folders are searched through as for training; a file that is named is tried whatever its ending. An image that can't be
read is named on stderr and left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsft import cli
from jaxsft.data import decode
from jaxsft.data.augment import normalise
from jaxsft.data.base import Options
from jaxsft.data.folder import EXTENSIONS, images
from jaxsft.data.threads import in_order
from jaxsft.models.precision import with_products
from jaxsft.models.weights import Preprocessing
from jaxsft.run.machine import keep_compilations
from jaxsft.run.saved import Run, load_run

BATCH = 32  # images a step at most


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files named, and the images in the folders named, in their order and each once.

    Raises:
      UserError: a path does not exist, or there is nothing to look at.
    """
    found: dict[Path, None] = {}
    for path in paths:
        try:
            if path.is_dir():
                found.update(dict.fromkeys(map(Path, images(path, Options(on_error="skip")))))
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


def read_image(path: Path, to: Preprocessing, upright: bool = True) -> np.ndarray:
    """The part of an image file that the model sees, [crop_size, crop_size, 3] in 0..255, as a run's evaluation has it.

    A picture that must be made smaller is resized on 8 bits (uint8), as for training on files; else in float32, without
    rounding to whole levels, as `augment.preprocess` does on the device, which would need a program for every size. It
    is within 1e-3 levels of torchvision's on float images, by either interpolation.

    Raises:
      Unreadable: it is no image, is broken or too large.
    """
    image = decode.read_rgb(path, upright)
    if min(image.size) > to.resize_size:
        return decode.middle(image, to.resize_size, to.crop_size, to.interpolation)
    floats = [channel.convert("F") for channel in image.split()]
    channels = [decode.middle(channel, to.resize_size, to.crop_size, to.interpolation) for channel in floats]
    return np.clip(np.stack(channels, -1), 0, 255)  # bicubic interpolation overshoots


def batches(paths: Sequence[Path], to: Preprocessing, upright: bool) -> Iterator[tuple[list[Path], np.ndarray]]:
    """The readable ones of `paths`, several at a time: their names, and float32 [B, crop, crop, 3] in 0..255.

    B is one number for all, the last batch is padded. The next ones are decoded meanwhile.
    """

    def attempt(path: Path) -> np.ndarray | decode.Unreadable:
        try:
            return read_image(path, to, upright)
        except decode.Unreadable as error:
            return error

    size = min(BATCH, 1 << (len(paths) - 1).bit_length())
    names: list[Path] = []
    batch = np.zeros((size, to.crop_size, to.crop_size, 3), np.float32)
    for path, image in zip(paths, in_order(attempt, paths, size), strict=True):
        if isinstance(image, decode.Unreadable):
            cli.warn(f"left out {path}: {image}")
            continue
        batch[len(names)] = image
        names.append(path)
        if len(names) == size:
            yield names, batch
            names = []
    if names:
        yield names, batch


def predict(run: Run, paths: Sequence[Path], topk: int) -> Iterator[dict[str, Any]]:
    """{"file", "classes": [{"class", "probability"}, ...]} of each readable image, the most probable first.

    Raises:
      UserError: the network computes no numbers.
    """
    to = run.card.preprocessing

    def body(variables: Any, images: jax.Array) -> jax.Array:
        return jax.nn.softmax(run.model.apply(variables, normalise(images, to), train=False))

    probabilities = jax.jit(with_products(body, run.config.train.matmul_precision))
    for names, batch in batches(paths, to, run.config.data.exif_orientation):
        rows = np.asarray(probabilities(run.variables, batch))[: len(names)]
        if not np.isfinite(rows).all():
            raise cli.UserError(f"the network of step {run.step} computes no numbers", "take another --checkpoint")
        for name, row in zip(names, rows, strict=True):
            best = np.argsort(-row, kind="stable")[:topk]
            classes = [{"class": run.card.names[i], "probability": float(row[i])} for i in best]
            yield {"file": str(name), "classes": classes}


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=cli.local_path)
    parser.add_argument("images", nargs="+", type=cli.local_path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--topk", type=int, default=5, help="classes an image (default: %(default)s)")
    parser.add_argument("--checkpoint", default="last", help="last, best or a step (default: %(default)s)")
    parser.add_argument("--json", type=cli.json_to, default="", help="write the predictions; -: on stdout")
    args = parser.parse_args()
    if args.topk < 1:
        raise cli.UserError(f"--topk is {args.topk}", "it must be 1 or more")
    keep_compilations()
    paths = find_images(args.images)
    run = load_run(args.workdir, args.checkpoint)
    results = []
    for result in predict(run, paths, args.topk):
        listed = "  ".join(f"{entry['class']} {entry['probability']:.3f}" for entry in result["classes"])
        cli.say(f"{result['file']}: {listed}")
        results.append(result)
    if not results:
        raise cli.UserError(f"none of {len(paths)} images can be read", f"name {', '.join(decode.FORMATS)} files")
    args.json({"step": run.step, "images": results})


if __name__ == "__main__":
    cli.run(main)
