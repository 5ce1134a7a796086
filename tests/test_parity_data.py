"""The pixels that reach the model, and a recipe run by a plain PyTorch script, against torchvision's transforms."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
import torch
from ml_collections import ConfigDict
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, resize

from convert import names
from convert.checkpoints import preprocessing_of
from convert.make_sample import resnet10_w16
from jaxsft.data.augment import preprocess
from jaxsft.data.base import Options
from jaxsft.data.sources import open_source
from jaxsft.flags import parse_flags
from jaxsft.models.weights import Preprocessing
from jaxsft.parity import networks, oracle
from jaxsft.run.prepare import prepare
from tests.conftest import ROOT

# Resize and crop of torchvision's presets V1 and V2, of CIFAR-10 at 224 and 64 px; up- and down-sampling.
PRESETS = (Preprocessing(256, 224), Preprocessing(232, 224), Preprocessing(224, 224), Preprocessing(64, 64))
SIZES = ((375, 500), (500, 375), (97, 131), (224, 224), (333, 257), (32, 32))  # height, width


def photo(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: smooth areas, edges of half the contrast from pixel to pixel, the noise of a sensor."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width]
    areas = 128 + 60 * np.sin(x / 17)[..., None] * np.cos(y[..., None] / [11, 13, 19])
    areas[height // 3 : height // 2, width // 4 : width // 2] = 190
    areas[height // 2 :, : width // 4] = 66
    return (areas + rng.normal(scale=5, size=(height, width, 3))).clip(0, 255).astype(np.uint8)


def noise(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: full contrast from pixel to pixel, as no lens gives it."""
    return np.random.default_rng(height * 1000 + width).integers(256, size=(height, width, 3), dtype=np.uint8)


# Kind of image, and the bound in grey levels against torchvision's float path. Both compute the position of each pixel
# in float32, to 1e-5 px; times the contrast from pixel to pixel that is the difference. torchvision's float32 is two to
# four times as far from its own float64.
IMAGES = ((photo, 1e-3), (noise, 3e-3))
# And against PIL, which rounds to whole grey levels after each of its two passes, half a level each. The weights of
# bicubic interpolation add up to 1.25 without their signs, by which the second pass stretches the first one's half; and
# what the first carries beyond 0..255 PIL clips before the second, which in noise is up to an eighth of 255.
OF_PIL = {
    "bilinear": {photo: 1.0, noise: 1.0},
    "bicubic": {photo: 1.125, noise: 26.0},
}  # fmt: skip


@pytest.mark.parametrize("mode", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
@pytest.mark.parametrize("to", PRESETS, ids=lambda p: f"{p.resize_size}-{p.crop_size}")
def test_pixels_are_torchvisions(to: Preprocessing, mode: InterpolationMode) -> None:
    to = dataclasses.replace(to, interpolation=mode.value)
    grey_levels = 255 * np.array(to.std)  # in one unit of the model's input
    pil = transforms.Compose(
        [
            transforms.Resize(to.resize_size, mode),
            transforms.CenterCrop(to.crop_size),
            transforms.ToTensor(),
            transforms.Normalize(to.mean, to.std),
        ]
    )
    for (make, bound), size in itertools.product(IMAGES, SIZES):
        image = make(*size)
        found = np.asarray(preprocess(image[None].astype(np.float32), to))[0]

        tensor = torch.from_numpy(image.transpose(2, 0, 1).copy()).float()
        tensor = resize(tensor, to.resize_size, mode, antialias=True).clip(0, 255)
        tensor = center_crop(tensor, to.crop_size) / 255
        exact = normalize(tensor, to.mean, to.std).numpy().transpose(1, 2, 0)
        assert (np.abs(found - exact) * grey_levels).max() <= bound, (make.__name__, size)

        rounded = pil(PIL.Image.fromarray(image)).numpy().transpose(1, 2, 0)
        of_pil = OF_PIL[mode.value][make]
        assert (np.abs(found - rounded) * grey_levels).max() <= of_pil + bound, (make.__name__, size)
        # Of 8 bits the same levels: what is left is the normalising, one rounding of a number up to 3.
        of_levels = np.asarray(preprocess(image[None], to))[0]
        np.testing.assert_allclose(of_levels, rounded, rtol=0, atol=1e-6)


def test_torchvisions_own_presets_are_these_steps() -> None:
    from torchvision.models import EfficientNet_B0_Weights, ResNet50_Weights, Swin_T_Weights

    for weights, to in (
        (ResNet50_Weights.IMAGENET1K_V1, PRESETS[0]),
        (ResNet50_Weights.IMAGENET1K_V2, PRESETS[1]),
        (EfficientNet_B0_Weights.IMAGENET1K_V1, Preprocessing(256, 224, interpolation="bicubic")),
        (Swin_T_Weights.IMAGENET1K_V1, Preprocessing(232, 224, interpolation="bicubic")),
    ):
        assert preprocessing_of(weights.transforms(), "they") == to
        image = photo(375, 500)
        expected = weights.transforms()(PIL.Image.fromarray(image)).numpy().transpose(1, 2, 0)
        found = np.asarray(preprocess(image[None], to))[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def reference(*overrides: str) -> ConfigDict:
    """The variant, with keys changed."""
    flags = ["--config", f"{ROOT}/configs/cifar10.py:reference", *(f"--config.{text}" for text in overrides)]
    config, _, _ = parse_flags(flags, "", {})
    return config


def pytorch_script(
    model: nn.Module, config: ConfigDict, batches: Iterator[tuple[np.ndarray, np.ndarray]]
) -> list[float]:
    """What a first PyTorch script for CIFAR-10 does, and the loss of each of its steps."""
    transform = transforms.Compose(
        [
            transforms.Resize(config.data.image_size),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    losses = []
    model.train()
    for images, labels in batches:
        inputs = torch.stack([transform(PIL.Image.fromarray(image)) for image in images])
        optimizer.zero_grad()
        loss = criterion(model(inputs), torch.from_numpy(labels).long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_reference(config: ConfigDict, model: nn.Module) -> None:
    """20 steps of ours and of the script, from the same weights and head, on the same examples in the same order."""
    with jax.default_matmul_precision("highest"):
        job, _ = prepare(config)
        oracle.load(model, names.to_torch(jax.device_get(job.state.variables()), job.card.arch))
        sums = [jax.device_get(job.update(range(step, step + 1))) for step in range(1, 21)]
    found = [float(s["loss"] / s["count"]) for s in sums]
    source = open_source(config.data.source, config.data.train_split, Options.of(config))
    batches = ((source.images[job.order[step]], source.labels[job.order[step]]) for step in range(20))
    # From the same pixels: what is left is float32 in another order, over 20 steps.
    np.testing.assert_allclose(found, pytorch_script(model, config, batches), rtol=1e-4)


def test_the_reference_recipe_is_the_plain_script() -> None:
    small = ("model.arch=resnet10_w16", "model.weights=sample", "data.source=sample", "data.image_size=40")
    config = reference(*small, "data.batch_size=20", "train.steps=20")
    check_reference(config, resnet10_w16(10))


@pytest.mark.full
def test_the_reference_recipe_at_full_size(realdata: Path, cifar7: Path) -> None:
    config = reference(f"data.data_dir={realdata / 'tfds'}", f"model.weights={cifar7}", "train.steps=20")
    check_reference(config, networks.build("resnet18", 10))
