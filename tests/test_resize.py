"""Resizing on the device is PIL's, to the last bit: so it does not matter where a picture is resized."""

from __future__ import annotations

import jax
import numpy as np
import PIL.Image
import pytest
import torch

from jaxsft.data import augment, resize
from jaxsft.data.base import LONG
from jaxsft.data.decode import REACH, middle, resampling
from jaxsft.models.weights import Preprocessing
from jaxsft.ship import onnx_file
from tests.files import picture
from tests.tiny import compiled


def of_pil(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(image).resize(size[::-1], resampling(interpolation)))


@pytest.mark.parametrize("interpolation", REACH)
def test_weights_and_order_are_pils(interpolation: str) -> None:
    """Noise, and black and white, which bicubic interpolation overshoots, from any size to any other."""
    random = np.random.default_rng(0)
    for number in range(60):
        before, after = (tuple(map(int, random.integers(1, 120, 2))) for _ in range(2))
        if number % 5 == 0:
            after = (before[0], after[1])
        image = picture(*before, seed=number)
        image = image if number % 3 else (image // 128) * 255
        order = resize.passes(before, after, interpolation)
        found = [resize.on_host(image[..., channel], after, order, interpolation) for channel in range(3)]
        np.testing.assert_array_equal(np.stack(found, -1), of_pil(image, after, interpolation), f"{before} {after}")


@pytest.mark.parametrize("interpolation", REACH)
@pytest.mark.parametrize(("before", "after"), [((32, 32), (64, 64)), ((90, 140), (40, 62)), ((1, 1), (8, 8)),
                                               ((20, 30), (20, 41)), ((7, 50), (28, 200))])  # fmt: skip
def test_the_device_computes_the_same(before: tuple[int, int], after: tuple[int, int], interpolation: str) -> None:
    images = np.stack([picture(*before, seed=seed) for seed in range(2)])
    found = compiled(lambda x: resize.resize(x, after, interpolation))(images)
    np.testing.assert_array_equal(found, [of_pil(image, after, interpolation) for image in images])


def test_whatever_the_matrix_unit_rounds_to() -> None:
    """Digits and levels are whole numbers of 8 bits, which bfloat16 has."""
    digits = resize.cut(resize.weights(50, 224, "bicubic"))
    for exact in (digits, np.arange(256, dtype=np.float32)):
        np.testing.assert_array_equal(exact, np.asarray(jax.numpy.asarray(exact, "bfloat16"), np.float32))
    whole = sum(digits[place].astype(np.int64) << 8 * place for place in range(resize.DIGITS))
    np.testing.assert_array_equal(whole, resize.weights(50, 224, "bicubic"))


def test_what_a_device_resizes_whole_the_host_does_too() -> None:
    """Up to base.LONG times as long as wide: the host takes strips of longer ones alone, which may round otherwise."""
    for size in ((9, 9 * LONG), (10 * LONG, 10)):
        image = picture(*size)
        whole = of_pil(image, tuple(20 * side // min(size) for side in size), "bilinear")
        top, left = (round((side - 16) / 2) for side in whole.shape[:2])
        found = middle(PIL.Image.fromarray(image), 20, 16, "bilinear")
        np.testing.assert_array_equal(found, whole[top : top + 16, left : left + 16])


@pytest.mark.parametrize("interpolation", REACH)
@pytest.mark.parametrize("size", [(50, 70), (24, 20), (32, 48), (16, 16)])
def test_a_program_in_torch_resizes_as_the_device_does(size: tuple[int, int], interpolation: str) -> None:
    """What an exported ONNX file has inside for pictures of one size: larger, smaller, of the right one."""
    to = Preprocessing(32, 24, interpolation=interpolation)
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    found = onnx_file.with_preprocessing(torch.nn.Identity(), to, size)(torch.from_numpy(images))
    expected = np.asarray(augment.preprocess(images, to))
    # The same levels; a division by 255 and one by the deviation are rounded differently.
    np.testing.assert_allclose(found.numpy().transpose(0, 2, 3, 1), expected, rtol=1e-6, atol=1e-6)
