"""Random augmentations: torchvision's operations and distributions, and the same pictures on any number of devices."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import autoaugment, v2
from torchvision.transforms import functional as F  # noqa: N812  (as torchvision's users write it)

from jaxsft.data import augment, color, mix, policy
from jaxsft.data.augment import Amounts
from tests.tensors import from_torch, picture, to_torch

COLOURS = {
    "brightness": (color.brightness, F.adjust_brightness, (0.3, 1.7)),
    "contrast": (color.contrast, F.adjust_contrast, (0.3, 1.7)),
    "saturation": (color.saturation, F.adjust_saturation, (0.0, 1.7)),
    "hue": (color.hue, F.adjust_hue, (-0.5, -0.1, 0.0, 0.3)),
    "sharpness": (color.sharpness, F.adjust_sharpness, (0.0, 0.5, 1.9)),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_of_float_images(name: str):
    ours, theirs, amounts = COLOURS[name]
    image = picture()
    image[:3] = 128  # grey: no hue
    for amount in amounts:
        want = from_torch(theirs(to_torch(image).float() / 255, amount)) * 255
        # float32 roundings on 0..255; the hue takes a difference of nearly equal channels, divided by their span.
        np.testing.assert_allclose(ours(jnp.float32(image), amount), want, atol=2e-3)


BLENDS = ("Brightness", "Color", "Contrast", "Sharpness", "AutoContrast")
OPERATIONS = [(name, sign) for name in policy.OPERATIONS for sign in (1, -1) if sign > 0 or name in policy.SIGNED]
apply = jax.jit(policy.apply)


@pytest.mark.parametrize(("name", "sign"), OPERATIONS)
@pytest.mark.parametrize("wide", [False, True])
def test_operations_of_policies(name: str, sign: int, wide: bool):
    """RandAugment's and TrivialAugment's tables and operations on uint8 images."""
    image = picture()
    number = policy.OPERATIONS.index(name)
    table = policy.WIDE_TABLE if wide else policy.rand_table(*image.shape[:2])
    space = (
        autoaugment.TrivialAugmentWide()._augmentation_space(policy.BINS)
        if wide
        else autoaugment.RandAugment()._augmentation_space(policy.BINS, image.shape[:2])
    )
    assert tuple(space) == policy.OPERATIONS
    magnitudes, signed = space[name]
    assert signed == (name in policy.SIGNED)
    np.testing.assert_allclose(table[number], np.broadcast_to(magnitudes.numpy(), policy.BINS), rtol=1e-6)
    for column in (0, 9, 30):
        magnitude = sign * float(table[number, column])
        want = autoaugment._apply_op(to_torch(image), name, magnitude, transforms.InterpolationMode.NEAREST, None)
        got = np.asarray(apply(jnp.float32(image), number, magnitude))
        difference = np.abs(got - from_torch(want)).max(-1)
        # A coordinate within float32 rounding of a half falls to either side, of 2,000 pixels a few; a blend that is a
        # whole level but for rounding is cut to that level or to the one below, often, as levels are whole numbers.
        few, one = (0.005, 255) if name in policy.MOVES else (1, 1) if name in BLENDS else (0, 0)
        assert (difference > 0).mean() <= few
        assert difference.max() <= one


def test_each_operation_and_sign_is_drawn_equally_often():
    keys = jax.random.split(jax.random.key(0), 7000)
    drawn = jax.vmap(lambda key: jax.random.randint(jax.random.split(key, 3)[0], (), 0, len(policy.OPERATIONS)))(keys)
    counts = np.bincount(drawn, minlength=len(policy.OPERATIONS))
    assert np.abs(counts - 500).max() < 5 * math.sqrt(500)  # 5 standard deviations of a binomial count


def test_flip_and_pad_crop():
    image = jnp.float32(picture(32, 32))
    keys = jax.random.split(jax.random.key(0), 400)
    flips = np.asarray(jax.jit(jax.vmap(lambda key: augment.flip(key, image, Amounts())))(keys))
    flipped = np.array([np.array_equal(x, image[:, ::-1]) for x in flips])
    assert all(f or np.array_equal(x, image) for f, x in zip(flipped, flips, strict=True))
    assert abs(flipped.mean() - 0.5) < 0.125  # 5 standard deviations
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    places = {(i, j): padded[i : i + 32, j : j + 32] for i in range(9) for j in range(9)}
    found = [
        [place for place, pixels in places.items() if np.array_equal(pixels, x)]
        for x in np.asarray(jax.jit(jax.vmap(lambda key: augment.pad_crop(key, image, Amounts())))(keys))
    ]
    assert all(len(f) == 1 for f in found)
    assert len({f[0] for f in found}) > 70  # of 81


def test_color_jitter_keeps_to_its_limits():
    """With one change alone it is torchvision's, with an amount drawn from its range; in all, orders vary."""
    image = jnp.float32(picture())
    jitter = jax.jit(lambda key: augment.color_jitter(key, image, Amounts(jitter=(0.4, 0, 0, 0))))
    for key in jax.random.split(jax.random.key(0), 20):
        ratio = float(jitter(key).sum() / image.sum())
        assert 0.59 < ratio < 1.41
    assert np.array_equal(augment.color_jitter(jax.random.key(0), image, Amounts(jitter=(0, 0, 0, 0))), image)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_as_torchvision(kind: str):
    """The share of the labels is that of the pixels, and is distributed as torchvision's."""
    own, partner = jnp.zeros((2, 16, 24, 1)), jnp.ones((2, 16, 24, 1))
    alphas = {"mixup": 0.4, "cutmix": 0.0} if kind == "mixup" else {"mixup": 0.0, "cutmix": 1.0}
    mixed, share = jax.jit(jax.vmap(lambda key: mix.mix(key, own, partner, **alphas)))(
        jax.random.split(jax.random.key(0), 1500)
    )
    np.testing.assert_allclose(1 - mixed.mean((1, 2, 3, 4)), share, atol=1e-6)
    torch.manual_seed(0)
    transform = (v2.MixUp if kind == "mixup" else v2.CutMix)(alpha=alphas[kind], num_classes=2)
    images = torch.stack([torch.zeros(1, 16, 24), torch.ones(1, 16, 24)])
    theirs = np.array([float(transform(images, torch.tensor([0, 1]))[1][0, 0]) for _ in range(1500)])
    mine = np.asarray(share)
    for power in (1, 2):  # mean and second moment to 5 standard deviations (at most 0.5 each)
        assert abs((mine**power).mean() - (theirs**power).mean()) < 5 * 0.5 * math.sqrt(2 / 1500)


ALL = (
    "random_resized_crop",
    "pad_crop",
    "flip",
    "color_jitter",
    "trivial_augment",
    "random_erasing",
)  # each kind of operation
PROGRAM = f"""
import sys, jax, numpy as np
from jaxsft.data.augment import train_images
from jaxsft.data.mix import mix
from jaxsft.run.parallel import DataParallel
from jaxsft.models.weights import Preprocessing
images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
examples = np.arange(100, 116, dtype=np.int32)
order = np.random.default_rng(1).permutation(16)
batches = {{"first": (7, images, examples), "in another order": (7, images[order], examples[order]),
            "by another key": (8, images, examples), "of one image": (7, np.repeat(images[:1], 16, 0), examples)}}
made = {{"order": order}}
for count in (1, 8):
    parallel = DataParallel(devices=jax.devices()[:count])
    def body(seed, _, batch):
        x = train_images(batch["image"], {ALL!r}, Preprocessing(48, 40), jax.random.key(seed), batch["example"])
        mixed, share = mix(jax.random.key(seed), batch["float"], batch["partner"], 0.4, 0.6)
        return jax.lax.all_gather(x, "batch").reshape(16, 40, 40, 3), jax.lax.all_gather(mixed, "batch").reshape(images.shape), share
    step = parallel.compile(body)
    for name, (seed, image, example) in batches.items():
        floats = image / np.float32(255)
        batch = parallel.split({{"image": image, "float": floats, "partner": floats[::-1], "example": example}})
        for kind, out in zip(("augmented", "mixed", "share"), step(np.int32(seed), {{"none": np.zeros(1)}}, batch)):
            made[f"{{count}} {{kind}} {{name}}"] = out
np.savez(sys.argv[1], **made)
"""


@pytest.fixture(scope="module")
def made(run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Batches of pictures by the devices that made them, what they are, and how they were asked for."""
    file = tmp_path_factory.mktemp("made") / "pictures.npz"
    done = run("-c", PROGRAM, file, devices=8)
    assert done.returncode == 0, done.stderr
    return dict(np.load(file))


def test_the_same_pictures_on_any_number_of_devices(made: dict[str, np.ndarray]):
    """Augmented and mixed images, and the share of each in the mixture."""
    on_one = {name.removeprefix("1 "): value for name, value in made.items() if name.startswith("1 ")}
    assert len(on_one) == 3 * 4
    for name, value in on_one.items():
        np.testing.assert_array_equal(made[f"8 {name}"], value, err_msg=name)


def test_a_picture_depends_on_key_and_example_alone(made: dict[str, np.ndarray]):
    """Its place in the batch and its neighbours do not matter; step and example do."""
    first = made["1 augmented first"]
    np.testing.assert_array_equal(made["1 augmented in another order"], first[made["order"]])
    assert not np.array_equal(made["1 augmented by another key"], first)
    assert len({x.tobytes() for x in made["1 augmented of one image"]}) == 16
