"""Crops and erased boxes are drawn and resized as torchvision does it."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F  # noqa: N812  (as torchvision's users write it)

from jaxsft.data import crop
from jaxsft.data.augment import train_images
from jaxsft.models.weights import Preprocessing
from tests.tensors import from_torch, picture, to_torch


def test_random_resized_crop_samples_as_torchvision():
    """Areas, aspect ratios and places of 4,000 boxes of one image, by the distance of distribution functions."""
    height, width, count = 60, 90, 4000
    sample = functools.partial(
        crop.sample_crop, height=jnp.float32(height), width=jnp.float32(width), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)
    )
    boxes = np.stack(jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(0), count)), 1)
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    want = np.array(
        [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], np.float64
    )
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()
    for name, of in (
        ("top", lambda b: b[:, 0]),
        ("left", lambda b: b[:, 1]),
        ("area", lambda b: b[:, 2] * b[:, 3]),
        ("aspect", lambda b: b[:, 3] / b[:, 2]),
    ):
        mine, theirs = np.sort(of(boxes.astype(np.float64))), np.sort(of(want))
        points = np.union1d(mine, theirs)
        distance = (
            np.abs(np.searchsorted(mine, points, "right") - np.searchsorted(theirs, points, "right")).max() / count
        )
        assert distance < 1.95 * math.sqrt(2 / count), name  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize(("height", "width"), [(20, 200), (200, 20), (7, 7)])
def test_where_no_box_fits_the_middle_is_cut_out(height: int, width: int):
    sample = jax.jit(functools.partial(crop.sample_crop, scale=(5.0, 6.0), ratio=(3 / 4, 4 / 3)))
    box = sample(jax.random.key(0), jnp.float32(height), jnp.float32(width))
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    assert tuple(map(int, box)) == transforms.RandomResizedCrop.get_params(image, [5.0, 6.0], [3 / 4, 4 / 3])


def noise(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: full contrast from pixel to pixel, as no lens gives it."""
    return np.random.default_rng(height * 1000 + width).integers(256, size=(height, width, 3), dtype=np.uint8)


MODES = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
crop_resize = jax.jit(crop.crop_resize, static_argnums=(2, 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("out", [16, 64])
@pytest.mark.parametrize("box", [(0, 0, 37, 53), (3, 5, 30, 40), (20, 30, 5, 4), (0, 0, 1, 1)])
def test_crops_are_resized_as_torchvision(box: tuple[int, int, int, int], out: int, mode: InterpolationMode):
    # Float32 sums of up to some hundred products of 0..255, and places in float32, to 4e-6 px of these sizes, times the
    # contrast from pixel to pixel; bicubic kernels are half as steep again as bilinear ones.
    steep = 1.5 if mode == InterpolationMode.BICUBIC else 1.0
    for image, bound in ((picture(), 1e-3), (noise(37, 53), 2e-3)):
        tensor = to_torch(image).float()
        want = from_torch(F.resized_crop(tensor, *box, [out, out], interpolation=mode, antialias=True).clip(0, 255))
        got = crop_resize(jnp.float32(image), tuple(map(jnp.float32, box)), out, mode.value)
        np.testing.assert_allclose(got, want, rtol=0, atol=steep * bound)


# Of crops of pictures of 500 px: kind of image, and the bound in grey levels against torchvision's float path (places
# are float32, to 3e-5 px) and, as in test_parity_data, against PIL.
BOUNDS = {
    "bilinear": (("mild", 2.5e-3, 1.0), ("noise", 1e-2, 1.0)),
    "bicubic": (("mild", 3e-3, 1.125), ("noise", 1.2e-2, 26.0)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("box", [(0, 0, 375, 500), (31, 7, 200, 260), (50, 60, 61, 44), (300, 420, 70, 75)])
def test_crops_of_larger_pictures_keep_to_their_bounds(box: tuple[int, int, int, int], mode: InterpolationMode):
    images = {"mild": picture(375, 500) // 2 + 64, "noise": noise(375, 500)}  # a mild one has nothing to clip
    for kind, of_floats, of_pil in BOUNDS[mode.value]:
        resized = functools.partial(F.resized_crop, size=[224, 224], interpolation=mode, antialias=True)
        exact = from_torch(resized(to_torch(images[kind]).float(), *box).clip(0, 255))
        rounded = np.asarray(resized(PIL.Image.fromarray(images[kind]), *box))
        got = crop_resize(jnp.float32(images[kind]), tuple(map(jnp.float32, box)), 224, mode.value)
        np.testing.assert_allclose(got, exact, rtol=0, atol=of_floats)
        np.testing.assert_allclose(got, rounded, rtol=0, atol=of_pil + of_floats)


def test_random_crops_are_resized_by_the_models_interpolation():
    """The box of the first key of an example, resized by either kernel, through all that training does."""
    images, key, names = np.stack([noise(48, 64)] * 3), jax.random.key(3), ("random_resized_crop",)

    def box_of(number: jax.Array) -> jax.Array:
        (own_key,) = jax.random.split(jax.random.fold_in(key, number), 1)
        return jnp.stack(crop.sample_crop(own_key, jnp.float32(48), jnp.float32(64), (0.08, 1.0), (3 / 4, 4 / 3)))

    boxes = np.asarray(jax.jit(jax.vmap(box_of))(np.arange(3))).astype(int).tolist()
    for mode in MODES:
        to = Preprocessing(40, 32, (0.0, 0.0, 0.0), (1 / 255,) * 3, mode.value)
        found = jax.jit(lambda images: train_images(images, names, to, key, np.arange(3)))(images)
        for image, box, got in zip(images, boxes, found, strict=True):
            cut = F.resized_crop(to_torch(image).float(), *box, [32, 32], interpolation=mode, antialias=True)
            np.testing.assert_allclose(got, from_torch(cut.clip(0, 255)), rtol=0, atol=3e-3)


random_resized_crop = jax.jit(crop.random_resized_crop, static_argnums=(3, 4))


@pytest.mark.parametrize("interpolation", crop.KERNELS)
@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (48, 72)])
def test_a_crop_of_a_canvas_is_the_crop_of_the_picture(height: int, width: int, interpolation: str):
    """A picture that is no larger than the canvas loses nothing on it, lying or upright."""
    from jaxsft.data.decode import onto_canvas

    image = picture(height, width)
    laid = np.empty((64, 96, 3), np.uint8)
    size = onto_canvas(PIL.Image.fromarray(image), laid, interpolation)
    for key in jax.random.split(jax.random.key(1), 5):
        want = random_resized_crop(key, jnp.float32(image), None, 32, interpolation)
        got = random_resized_crop(key, jnp.float32(laid), jnp.asarray(size), 32, interpolation)
        np.testing.assert_allclose(got, want, atol=1e-3)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def matrices(start: jax.Array, length: jax.Array, size: int, out: int, interpolation: str) -> jax.Array:
    kernel = crop.KERNELS[interpolation]
    return jax.vmap(lambda s, n: crop.resize_matrix(s, n, size, out, kernel))(start, length)


@pytest.mark.parametrize("interpolation", crop.KERNELS)
def test_weights_of_any_box_are_finite(interpolation: str):
    """Boxes narrower than a pixel, wherever they lie."""
    random = np.random.default_rng(0)
    for size, out in ((96, 32), (1, 8)):
        length = np.concatenate([np.full(150, 1e-3), 10 ** random.uniform(-7, 0, 150), [0, 0.999999, 1]])
        length = np.float32(np.concatenate([length, random.uniform(1, max(size / 8, 1), 1000)]))
        start = np.float32(random.uniform(0, size - length))
        start[::4] = np.floor(start[::4])  # an edge on a pixel's
        start[1::4] = np.minimum(np.floor(start[1::4]) + 0.5, size - length[1::4])  # and on its centre
        weights = np.asarray(matrices(start, length, size, out, interpolation))
        np.testing.assert_allclose(weights.sum(2), 1, atol=1e-6)  # a sum of up to 96 float32
        # Bilinear ones are shares; bicubic ones overshoot by an eighth, at the edge of a box by a little more.
        assert np.abs(weights).sum(2).max() <= (1 + 1e-6 if interpolation == "bilinear" else 1.5)
        pixels = np.arange(size)
        far = (pixels < start[:, None] - 1) | (pixels > (start + length)[:, None])
        assert (np.abs(weights).max(1)[far] == 0).all()


def test_the_cubic_kernel_is_exact_near_its_zeros():
    """A weight alone at the edge of a box is divided by itself: what counts are its digits, not its size."""
    off = 2.0 ** -np.arange(1, 14)  # closer, and float64 cancels as well
    x = np.float32(np.concatenate([1 - off, 1 + off, 2 - off]))
    wide = x.astype(np.float64)
    near, far = 1.5 * wide**3 - 2.5 * wide**2 + 1, -0.5 * wide**3 + 2.5 * wide**2 - 4 * wide + 2
    np.testing.assert_allclose(crop.keys_cubic(jnp.asarray(x)), np.where(wide < 1, near, far), rtol=1e-6)
    assert not np.asarray(crop.keys_cubic(jnp.float32([1, 2, 2.5, 1e6]))).any()


def test_weights_of_whole_pixels_are_plain_triangles():
    """As they are without the care for boxes that hold no pixel's centre."""

    def plain(start: jax.Array, length: jax.Array, size: int, out: int) -> jax.Array:
        centre = start + (jnp.arange(out) + 0.5) * (length / out)
        pixel = jnp.arange(size) + 0.5
        weight = jnp.maximum(1 - jnp.abs(pixel - centre[:, None]) / jnp.maximum(length / out, 1), 0)
        weight = jnp.where((pixel > start) & (pixel < start + length), weight, 0)
        return weight / weight.sum(1, keepdims=True)

    random = np.random.default_rng(0)
    start = random.integers(0, 60, 50).astype(np.float32)
    length = np.floor(random.uniform(1, 64 - start + 1)).astype(np.float32)
    before = jax.jit(jax.vmap(plain, in_axes=(0, 0, None, None)), static_argnums=(2, 3))(start, length, 64, 48)
    # Two programs: where LLVM makes one operation of a product and a sum, 1 - |x| is rounded otherwise.
    found = matrices(start, length, 64, 48, "bilinear")
    np.testing.assert_allclose(found, before, rtol=0, atol=float(np.finfo(np.float32).eps))


@pytest.mark.parametrize("interpolation", crop.KERNELS)
def test_thin_pictures_on_a_canvas_are_finite(interpolation: str):
    """Training's whole path, with pictures so thin that a crop is narrower than the canvas's pixels."""
    from jaxsft.data.decode import onto_canvas

    laid = np.empty((3, 64, 96, 3), np.uint8)
    thin = [PIL.Image.new("RGB", size, (200, 200, 200)) for size in ((2, 5000), (5000, 2), (60_000, 1))]
    sizes = np.stack([onto_canvas(image, out, interpolation) for image, out in zip(thin, laid, strict=True)])
    to, names = Preprocessing(64, 56, (0.0,) * 3, (1.0,) * 3, interpolation), ("random_resized_crop", "flip")
    train = jax.jit(lambda key, images, sizes: train_images(images, names, to, key, np.arange(3), sizes=sizes))
    for step in range(5):
        x = np.asarray(train(jax.random.key(step), laid, sizes))
        np.testing.assert_allclose(x, 200 / 255, atol=1e-5)  # of one grey, nothing of the black around


def test_random_erasing_as_torchvision():
    count, side = 1000, 40
    erase = jax.jit(jax.vmap(lambda key: (crop.random_erasing(key, jnp.ones((side, side, 1))) == 0).sum()))
    mine = np.asarray(erase(jax.random.split(jax.random.key(0), count))) / side**2
    torch.manual_seed(0)
    theirs = np.array(
        [(transforms.RandomErasing()(torch.ones(1, side, side)) == 0).float().mean() for _ in range(count)]
    )
    assert abs((mine > 0).mean() - (theirs > 0).mean()) < 5 * math.sqrt(0.5 / count)  # how often: 5 deviations
    mine, theirs = mine[mine > 0], theirs[theirs > 0]
    assert abs(mine.mean() - theirs.mean()) < 5 * 0.09 * math.sqrt(2 / len(mine))  # how much; 0.09: U(0.02, 0.33)'s
