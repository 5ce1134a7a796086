"""RandAugment (arXiv:1909.13719) and TrivialAugment Wide (arXiv:2103.10158) by torchvision's tables of operations.

As in torchvision they work on whole grey levels: images [H, W, 3] in 0..255, one at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.data import color

BINS = 31  # magnitudes an operation can have
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
COLOURS = ("Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")
OPERATIONS = ("Identity", *MOVES, *COLOURS)
SIGNED = frozenset((*MOVES, "Brightness", "Color", "Contrast", "Sharpness"))  # take either sign, by a coin


def table(shear: float, shift: tuple[float, float], turn: float, colour: float, bits: int) -> np.ndarray:
    """The magnitudes of each operation, float32 [len(OPERATIONS), BINS].

    Args:
      shear: the largest, as a slope.
      shift: the largest in x and in y, px.
      turn: the largest, degrees.
      colour: the largest change of brightness, saturation, contrast and sharpness.
      bits: how many posterizing takes at most.
    """
    largest = {
        **dict.fromkeys(("ShearX", "ShearY"), shear),
        **dict(zip(("TranslateX", "TranslateY"), shift, strict=True)),
        "Rotate": turn,
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), colour),
    }
    rows = {name: np.linspace(0, most, BINS) for name, most in largest.items()}
    rows["Posterize"] = 8 - np.round(np.arange(BINS) / ((BINS - 1) / bits))
    rows["Solarize"] = np.linspace(255, 0, BINS)
    return np.array([rows.get(name, np.zeros(BINS)) for name in OPERATIONS], np.float32)


def rand_table(height: int, width: int) -> np.ndarray:
    """RandAugment's magnitudes for images of this size."""
    return table(0.3, (150 / 331 * width, 150 / 331 * height), 30, 0.9, 4)


WIDE_TABLE = table(0.99, (32, 32), 135, 0.99, 6)


def matrix(operation: jax.Array, magnitude: jax.Array, height: int, width: int) -> jax.Array:
    """The affine matrix [2, 3] of an operation, from output to input; the identity where it moves nothing."""
    m, shift = magnitude, jnp.trunc(magnitude)
    cos, sin = jnp.cos(jnp.deg2rad(m)), jnp.sin(jnp.deg2rad(m))
    choices = {
        "ShearX": [1, m, m * height / 2, 0, 1, 0],  # about the upper left corner
        "ShearY": [1, 0, 0, m, 1, m * width / 2],
        "TranslateX": [1, 0, -shift, 0, 1, 0],
        "TranslateY": [1, 0, 0, 0, 1, -shift],
        "Rotate": [cos, -sin, 0, sin, cos, 0],
    }
    rows = [jnp.stack([jnp.float32(x) for x in choices.get(name, [1, 0, 0, 0, 1, 0])]) for name in OPERATIONS]
    return jnp.stack(rows)[operation].reshape(2, 3)


def apply(image: jax.Array, operation: jax.Array, magnitude: jax.Array) -> jax.Array:
    """Operation number `operation` of OPERATIONS with a signed magnitude from its table."""
    moved = color.affine(image, matrix(operation, magnitude, *image.shape[:2]))
    branches = {
        "Brightness": lambda x, m: color.brightness(x, 1 + m, whole=True),
        "Color": lambda x, m: color.saturation(x, 1 + m, whole=True),
        "Contrast": lambda x, m: color.contrast(x, 1 + m, whole=True),
        "Sharpness": lambda x, m: color.sharpness(x, 1 + m, whole=True),
        "Posterize": color.posterize,
        "Solarize": color.solarize,
        "AutoContrast": lambda x, m: color.autocontrast(x),
        "Equalize": lambda x, m: color.equalize(x),
    }
    still = len(OPERATIONS) - len(COLOURS)
    unchanged = [lambda x, m: x]
    number = jnp.maximum(operation - still + 1, 0)
    return jax.lax.switch(number, unchanged + [branches[name] for name in COLOURS], moved, magnitude)


def draw_and_apply(key: jax.Array, image: jax.Array, magnitudes: np.ndarray, column: int | None) -> jax.Array:
    """One operation drawn evenly, of magnitude `column` of its row (None: drawn too), its sign by a coin."""
    keys = jax.random.split(key, 3)
    operation = jax.random.randint(keys[0], (), 0, len(OPERATIONS))
    at = jax.random.randint(keys[1], (), 0, BINS) if column is None else column
    signed = jnp.asarray([name in SIGNED for name in OPERATIONS])[operation]
    sign = jnp.where(signed & jax.random.bernoulli(keys[2]), -1.0, 1.0)
    return apply(image, operation, sign * jnp.asarray(magnitudes)[operation, at])


def rand_augment(key: jax.Array, image: jax.Array, operations: int = 2, magnitude: int = 9) -> jax.Array:
    """`RandAugment(operations, magnitude)` of one image."""
    image = jnp.round(image)
    for own_key in jax.random.split(key, operations):
        image = draw_and_apply(own_key, image, rand_table(*image.shape[:2]), magnitude)
    return image


def trivial_augment(key: jax.Array, image: jax.Array) -> jax.Array:
    """`TrivialAugmentWide()` of one image."""
    return draw_and_apply(key, jnp.round(image), WIDE_TABLE, None)
