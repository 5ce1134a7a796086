"""Name what is on pictures: the most probable classes of each, by the newest checkpoint of a run.

python -m jaxsft.predict --workdir DIR IMAGE_OR_FOLDER ... [--topk 5] [--json FILE]

Folders are searched through. An image that can't be read is named on stderr and left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from jaxsft import cli
from jaxsft.data import decode
from jaxsft.data.augment import normalise, preprocess
from jaxsft.data.folder import EXTENSIONS
from jaxsft.weights import Preprocessing
from jaxsft.workdir import Run, load_run

BATCH = 32  # images a step; the last batch is padded, so that one program serves all
MATRIX = 2**26  # entries of the matrix by which the device resizes a side: 256 MB; longer pictures are PIL's


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files named, and the images in the folders named, in their order and each once.

    Raises:
      UserError: a path does not exist, or there is nothing to look at.
    """
    found: dict[Path, None] = {}
    for path in paths:
        try:
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
                found.update(dict.fromkeys(inside))
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
    """An image file as the model's input, float32 [crop_size, crop_size, 3], as the evaluation of a run makes it.

    Where the picture must be made smaller PIL does it, on 8 bits, as for training on files; else the device does.

    Raises:
      Unreadable: it is no image, is broken, too large, or too long and thin.
    """
    image = decode.read_rgb(path, upright)
    width, height = image.size
    long, short = max(width, height), min(width, height)
    long_resized = to.resize_size * long // short
    if to.resize_size * long_resized > (PIL.Image.MAX_IMAGE_PIXELS or float("inf")):
        raise decode.Unreadable(f"{width} x {height} px is too long and thin")
    if short <= to.resize_size and long * long_resized <= MATRIX:
        return np.asarray(preprocess(jnp.asarray(image)[None], to)[0])
    middle = decode.middle(image, to.resize_size, to.crop_size)
    return np.asarray(normalise(jnp.asarray(middle, jnp.float32), to))


def batches(paths: Sequence[Path], to: Preprocessing, upright: bool) -> Iterator[tuple[list[Path], np.ndarray]]:
    """The readable ones of `paths`, up to BATCH at a time: their names, and float32 [BATCH, crop, crop, 3]."""
    names: list[Path] = []
    images = np.zeros((BATCH, to.crop_size, to.crop_size, 3), np.float32)
    for path in paths:
        try:
            images[len(names)] = read_image(path, to, upright)
        except decode.Unreadable as error:
            print(f"warning: left out {path}: {error}", file=sys.stderr, flush=True)
            continue
        names.append(path)
        if len(names) == BATCH:
            yield names, images
            names = []
    if names:
        yield names, images


def predict(run: Run, paths: Sequence[Path], topk: int) -> Iterator[dict[str, Any]]:
    """{"file", "classes": [{"class", "probability"}, ...]} of each readable image, the most probable first."""
    probabilities = jax.jit(lambda images: jax.nn.softmax(run.model.apply(run.variables, images, train=False)))
    upright = run.config.data.exif_orientation
    for names, images in batches(paths, run.card.preprocessing, upright):
        rows = np.asarray(probabilities(images))
        for name, row in zip(names, rows, strict=False):
            best = np.argsort(-row, kind="stable")[:topk]
            classes = [{"class": run.card.names[i], "probability": float(row[i])} for i in best]
            yield {"file": str(name), "classes": classes}


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--topk", type=int, default=5, help="classes an image (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the predictions")
    args = parser.parse_args()
    if args.topk < 1:
        raise cli.UserError(f"--topk is {args.topk}", "it must be 1 or more")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files are any bytes
    paths = find_images(args.images)
    run = load_run(args.workdir)
    results = []
    for result in predict(run, paths, args.topk):
        listed = "  ".join(f"{entry['class']} {entry['probability']:.3f}" for entry in result["classes"])
        print(f"{result['file']}: {listed}", flush=True)
        results.append(result)
    if not results:
        raise cli.UserError(f"none of {len(paths)} images can be read", "name JPEG, PNG, WebP or BMP files")
    if args.json:
        cli.write_json(args.json, {"step": run.step, "images": results})


if __name__ == "__main__":
    cli.run(main)
