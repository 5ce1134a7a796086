"""A tuned model as a StableHLO program, weights and preprocessing included: the serialized form of `jax.export`.

The file is read in two ways. `jax.export.deserialize` takes its bytes as they are; and it is a zip archive of one
entry, `model.json`, the facts of the model, which any unzip shows. A flatbuffer, which the serialized program is, is
found from its first bytes and may be followed by anything; a zip archive is found from its last, and may follow
anything. TFLite's files carry their labels in the same way.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxsft.data.augment import normalise, preprocess
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.precision import DEFAULT, with_products
from jaxsft.models.weights import CARD, ModelCard
from jaxsft.ship.facts import BATCH, facts, taken

PLATFORMS = ("cpu", "cuda", "tpu")
FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # a zip's first: the same model makes the same bytes


def to_stablehlo(
    variables: Mapping[str, Any],
    card: ModelCard,
    *,
    matmul_precision: str = DEFAULT,
    step: int = 0,
    image_size: tuple[int, int] | None = None,
) -> bytes:
    """A model as a program of `jax.export` for PLATFORMS: uint8 images [n, H, W, 3] to float32 logits [n, num_classes].

    It computes in float32, whatever the run did. JAX reads the form for six months after it was written.

    Args:
      variables: {"params", "batch_stats"}, float32.
      card: of them.
      matmul_precision: how products are multiplied, as `train.matmul_precision` says.
      step: of the run, for the facts.
      image_size: (height, width) in px of the pictures, which are then resized and cropped inside; None: they have
        been, as by `data.decode.middle`, to [n, crop_size, crop_size, 3], and are divided by 255 and normalised inside.
    """
    to, model = card.preprocessing, ARCHITECTURES[card.arch](num_classes=card.num_classes)
    height, width = image_size or (to.crop_size, to.crop_size)

    def logits(images: jax.Array) -> jax.Array:
        x = preprocess(images, to) if image_size else normalise(images.astype(jnp.float32), to)
        return model.apply(variables, x, train=False)

    (count,) = jax.export.symbolic_shape(BATCH)
    images = jax.ShapeDtypeStruct((count, height, width, 3), jnp.uint8)
    exported = jax.export.export(jax.jit(with_products(logits, matmul_precision)), platforms=PLATFORMS)(images)
    file = io.BytesIO(bytes(exported.serialize()))
    said = json.dumps(facts(variables, card, step, taken(to, image_size)), indent=2) + "\n"
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(zipfile.ZipInfo(CARD, FIRST_DAY), said)
    return file.getvalue()


def read(path: Path) -> tuple[jax.export.Exported, dict[str, Any]]:
    """The program in a file, and its facts."""
    with zipfile.ZipFile(path) as archive:
        said = json.loads(archive.read(CARD))
    return jax.export.deserialize(bytearray(path.read_bytes())), said
