"""Device side, inside the compiled step: uint8 images at source size become the model's input.

`preprocess` resizes, crops and normalises; AUGMENTATIONS are random and come first, in float32 on 0..255, each example
with a key of its own made of (seed, step, example): the same pictures whatever the number of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxsft.weights import Preprocessing

PAD = 4  # px at source size, as usual for 32 px images


def pad_crop(key: jax.Array, image: jax.Array) -> jax.Array:
    """`RandomCrop(size, padding=4, padding_mode="reflect")`: an image [H, W, 3] moved by up to 4 px each way."""
    height, width, channels = image.shape
    padded = jnp.pad(image, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect")
    top, left = jax.random.randint(key, (2,), 0, 2 * PAD + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), (height, width, channels))


def flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """`RandomHorizontalFlip(0.5)` of an image [H, W, 3]."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


Augmentation = Callable[[jax.Array, jax.Array], jax.Array]
AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType({"pad_crop": pad_crop, "flip": flip})


def augment(images: jax.Array, names: Sequence[str], key: jax.Array, examples: jax.Array) -> jax.Array:
    """Apply the named augmentations in turn.

    Args:
      images: [N, H, W, 3], any dtype.
      names: keys of AUGMENTATIONS.
      key: of the step.
      examples: int32 [N], the index of each example in its data set.
    """

    def one(image: jax.Array, example: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(key, example), max(len(names), 1))
        for name, own_key in zip(names, keys, strict=False):
            image = AUGMENTATIONS[name](own_key, image)
        return image

    return jax.vmap(one)(images, examples) if names else images


def preprocess(images: jax.Array, to: Preprocessing) -> jax.Array:
    """Images [N, H, W, 3] in 0..255 as the model's input float32 [N, crop_size, crop_size, 3].

    torchvision's `Resize(resize_size)`, `CenterCrop(crop_size)`, `ToTensor()`, `Normalize(mean, std)` on float images:
    bilinear with antialiasing, no rounding to whole grey levels in between.
    """
    x = images.astype(jnp.float32)
    count, height, width, channels = x.shape
    short = min(height, width)
    size = (to.resize_size * height // short, to.resize_size * width // short)
    if size != (height, width):
        x = jax.image.resize(x, (count, *size, channels), "bilinear", antialias=True)
    # Half rounds to even, as in torchvision's center_crop.
    top, left = (round((side - to.crop_size) / 2) for side in size)
    x = x[:, top : top + to.crop_size, left : left + to.crop_size]
    mean, std = (jnp.asarray(v, jnp.float32) for v in (to.mean, to.std))
    return (x / 255 - mean) / std
