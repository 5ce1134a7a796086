"""Pictures of a training batch, as the model sees them: augmented, resized and cut.

python -m jaxsft.data.show --config configs/cifar10.py[:VARIANT] --out grid.png [--config.KEY=VALUE ...]
"""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxsft import cli, storage
from jaxsft import config as config_module
from jaxsft.data.augment import Amounts, train_images
from jaxsft.data.base import Source
from jaxsft.data.classes import said
from jaxsft.data.loader import BadFiles, make_loader
from jaxsft.data.order import Order
from jaxsft.data.reading import TrainPlan
from jaxsft.data.sources import open_splits
from jaxsft.flags import parse_flags
from jaxsft.learn.objective import gather
from jaxsft.models.initial import preprocessing
from jaxsft.models.weights import Preprocessing
from jaxsft.run.parallel import DataParallel

if TYPE_CHECKING:
    import matplotlib.figure

COLUMNS, MOST = 8, 64
CELL, SIDE, MARGIN, TITLE = (1.4, 1.55), 1.3, 0.05, 0.22  # inches: of a cell, and of what is in it


def batch_of(config: ConfigDict, source: Source, to: Preprocessing, most: int = MOST) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of the first batch, up to `most` of them.

    Returns:
      float32 [N, crop_size, crop_size, 3] in 0..1, before mixing, and the labels.
    """
    order = Order(len(source), min(config.data.batch_size, len(source)), config.seed)
    names = tuple(config.data.augment)
    devices = DataParallel("shard_map", jax.local_devices()[:1])
    bad = BadFiles(config.data.on_error)
    loader = make_loader(source, TrainPlan(order), devices, to, augmentations=names, workers=0, bad=bad)
    seed, amounts = config.seed, Amounts.of(config)
    rest = loader.preprocessing  # what the host leaves to the device

    @jax.jit
    def look(dataset: dict[str, jax.Array], batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        batch = gather(dataset, jax.tree.map(lambda x: x[:most], batch))
        key = jax.random.fold_in(jax.random.key(seed), 0)  # as the train step's
        x = train_images(batch["image"], names, rest, key, batch["example"], sizes=batch.get("size"), amounts=amounts)
        return (x * jnp.asarray(to.std) + jnp.asarray(to.mean)).clip(0, 1), batch["label"]

    images, labels = jax.device_get(look(loader.dataset, loader.batch(0)))
    loader.close()
    return images, labels


def grid(images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> matplotlib.figure.Figure:
    """The images in rows of COLUMNS, each under the name of its class, or the names of several."""
    import matplotlib.figure  # here: a report takes the batch alone, and draws it by itself

    width, height = COLUMNS * CELL[0], -(-len(images) // COLUMNS) * CELL[1]
    figure = matplotlib.figure.Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))  # one for all: to lay out one for each picture took a second
    axes.set_axis_off()
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = number % COLUMNS * CELL[0] + MARGIN, number // COLUMNS * CELL[1] + TITLE
        axes.imshow(image, extent=(left, left + SIDE, top + SIDE, top), interpolation="nearest")
        name = cli.printable(said(label, class_names))
        axes.text(left + SIDE / 2, top - 0.03, name, fontsize=8, ha="center", parse_math=False)  # a $ is a $
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def main() -> None:
    import matplotlib.figure

    assert __doc__ is not None
    config, values, _ = parse_flags(sys.argv[1:], __doc__, {"out": "the picture to write, such as grid.png"})
    if not values["out"]:
        raise cli.UserError("no --out", "name the picture to write, such as --out=grid.png")
    out = storage.location(values["out"])
    formats = matplotlib.figure.Figure().canvas.get_supported_filetypes()
    if out.suffix[1:].lower() not in formats:
        raise cli.UserError(
            f"--out {out} is no name of a picture", f"let it end in one of {', '.join(sorted(formats))}"
        )
    storage.check_writable(out)
    config_module.check(config)
    source = open_splits(config)[0]
    figure = grid(*batch_of(config, source, preprocessing(config)), source.class_names)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=out.suffix[1:].lower())
    storage.write_file(out, picture.getvalue())
    cli.say(out)


if __name__ == "__main__":
    cli.run(main)
