"""Device side, inside the compiled step: uint8 images become the model's input.

AUGMENTATIONS are random, in float32 on 0..255, each example with a key of its own made of (seed, step, example): the
same pictures whatever the number of devices. `preprocess` is what evaluation does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxsft.data import color, crop, policy
from jaxsft.data.resize import resize
from jaxsft.models.weights import Preprocessing

METHODS = MappingProxyType({"bilinear": "bilinear", "bicubic": "cubic"})  # interpolation -> jax.image.resize's word
PAD = 4  # px at source size, as usual for 32 px images
RANDOM_CROP, ERASING = "random_resized_crop", "random_erasing"


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How strong the augmentations are; torchvision's defaults where it has one."""

    crop_scale: tuple[float, float] = (0.08, 1.0)  # of the area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    rand_augment: tuple[int, int] = (2, 9)  # operations, magnitude of 0..30
    erasing: float = 0.5  # probability

    @classmethod
    def of(cls, config: Any) -> Amounts:
        """From a run's config."""
        data = config.data
        scale, ratio = tuple(data.crop_scale), tuple(data.crop_ratio)
        return cls(scale, ratio, tuple(data.jitter), tuple(data.rand_augment), data.erasing)


def pad_crop(key: jax.Array, image: jax.Array, amounts: Amounts) -> jax.Array:
    """`RandomCrop(size, padding=4, padding_mode="reflect")`: an image [H, W, 3] moved by up to 4 px each way."""
    height, width, channels = image.shape
    padded = jnp.pad(image, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect")
    top, left = jax.random.randint(key, (2,), 0, 2 * PAD + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), (height, width, channels))


def flip(key: jax.Array, image: jax.Array, amounts: Amounts) -> jax.Array:
    """`RandomHorizontalFlip(0.5)` of an image [H, W, 3]."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def color_jitter(key: jax.Array, image: jax.Array, amounts: Amounts) -> jax.Array:
    """`ColorJitter(*amounts.jitter)` of an image [H, W, 3]: four changes in a random order."""
    order_key, *keys = jax.random.split(key, 5)
    lows = [max(0.0, 1 - a) for a in amounts.jitter[:3]] + [-amounts.jitter[3]]
    highs = [1 + a for a in amounts.jitter[:3]] + [amounts.jitter[3]]
    limits = zip(keys, lows, highs, strict=True)
    drawn = jnp.stack([jax.random.uniform(own_key, (), minval=low, maxval=high) for own_key, low, high in limits])
    changes = (color.brightness, color.contrast, color.saturation, color.hue)
    active = [i for i, a in enumerate(amounts.jitter) if a > 0]  # as torchvision: an amount of 0 is no change at all
    if not active:
        return image
    branches = [changes[i] for i in active]
    for slot in jax.random.permutation(order_key, len(active)):
        image = jax.lax.switch(slot, branches, image, drawn[jnp.asarray(active)][slot])
    return image


def rand_augment(key: jax.Array, image: jax.Array, amounts: Amounts) -> jax.Array:
    """`RandAugment(*amounts.rand_augment)` of an image [H, W, 3]."""
    return policy.rand_augment(key, image, *amounts.rand_augment)


def trivial_augment(key: jax.Array, image: jax.Array, amounts: Amounts) -> jax.Array:
    """`TrivialAugmentWide()` of an image [H, W, 3]."""
    return policy.trivial_augment(key, image)


Augmentation = Callable[[jax.Array, jax.Array, Amounts], jax.Array]
# Those that leave the size as it is, in any order, at the size that the images have when they arrive.
IN_PLACE: Mapping[str, Augmentation] = MappingProxyType(
    {
        "pad_crop": pad_crop,
        "flip": flip,
        "color_jitter": color_jitter,
        "rand_augment": rand_augment,
        "trivial_augment": trivial_augment,
    }
)
# RANDOM_CROP comes first, in the place of the resizing to the model's size; ERASING last, after normalising.
AUGMENTATIONS = (RANDOM_CROP, *IN_PLACE, ERASING)


def train_images(
    images: jax.Array,
    names: Sequence[str],
    to: Preprocessing,
    key: jax.Array,
    examples: jax.Array,
    *,
    sizes: jax.Array | None = None,
    amounts: Amounts = Amounts(),
) -> jax.Array:
    """The named augmentations in turn, and the preprocessing: float32 [N, crop_size, crop_size, 3].

    Args:
      images: [N, H, W, 3] in 0..255, any dtype.
      names: of AUGMENTATIONS.
      to: what the model wants.
      key: of the step.
      examples: int32 [N], the index of each example in its data set.
      sizes: int32 [N, 4] of images on a canvas, which must be cropped (see `decode.onto_canvas`).
      amounts: of the augmentations.
    """

    def keys(example: jax.Array) -> jax.Array:
        return jax.random.split(jax.random.fold_in(key, example), max(len(names), 1))

    def one(image: jax.Array, example: jax.Array, size: jax.Array | None) -> jax.Array:
        for name, own_key in zip(names, keys(example), strict=False):
            if name == RANDOM_CROP:
                image = crop.random_resized_crop(
                    own_key, image, size, to.crop_size, to.interpolation, amounts.crop_scale, amounts.crop_ratio
                )
            elif name != ERASING:
                image = IN_PLACE[name](own_key, image, amounts)
        return image

    x = images.astype(jnp.float32) if names else images  # without augmentation they are what evaluation sees
    if names:
        x = jax.vmap(one, in_axes=(0, 0, None if sizes is None else 0))(x, examples, sizes)
    x = normalise(x, to) if RANDOM_CROP in names else preprocess(x, to)
    if ERASING in names:
        own_keys = jax.vmap(lambda example: keys(example)[list(names).index(ERASING)])(examples)
        x = jax.vmap(lambda k, image: crop.random_erasing(k, image, amounts.erasing))(own_keys, x)
    return x


def preprocess(images: jax.Array, to: Preprocessing) -> jax.Array:
    """Images [N, H, W, 3] in 0..255 as the model's input float32 [N, crop_size, crop_size, 3].

    torchvision's `Resize(resize_size, interpolation)`, `CenterCrop(crop_size)`, `ToTensor()`, `Normalize(mean, std)`,
    with antialiasing. As in torchvision the type decides how. uint8 images are resized as PIL images are, to the last
    bit (see `resize`): what the host resizes, file by file, and what the device does, are the same pixels.

    Others, such as augmented ones, are resized as torchvision's float images, clipped to 0..255, without rounding to
    whole grey levels. Bounds, in grey levels of 0..255: it is torchvision's within 1e-3 on pictures and 3e-3 on noise,
    by either interpolation. PIL's 8 bits are within 1 (bilinear) or 1.125 (bicubic, where nothing is clipped) of it: it
    rounds after each of its two passes. It clips in between, too, which in bicubic interpolation changes up to 10 on
    photographs, at a few edges in black or white, and 26 on noise.
    """
    x = jnp.asarray(images)
    count, height, width, channels = x.shape
    short = min(height, width)
    size = (to.resize_size * height // short, to.resize_size * width // short)
    if size != (height, width) and x.dtype == jnp.uint8:
        x = resize(x, size, to.interpolation)
    elif size != (height, width):
        x = jax.image.resize(x.astype(jnp.float32), (count, *size, channels), METHODS[to.interpolation], antialias=True)
        x = jnp.clip(x, 0, 255)  # bicubic interpolation overshoots, and PIL clips it too
    x = x.astype(jnp.float32)
    # Half rounds to even, as in torchvision's center_crop.
    top, left = (round((side - to.crop_size) / 2) for side in size)
    return normalise(x[:, top : top + to.crop_size, left : left + to.crop_size], to)


def normalise(images: jax.Array, to: Preprocessing) -> jax.Array:
    """(x / 255 - mean) / std per channel."""
    mean, std = (jnp.asarray(v, jnp.float32) for v in (to.mean, to.std))
    return (images / 255 - mean) / std
