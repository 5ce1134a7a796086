"""Views of images for test-time augmentation: torchvision's, through torch's network, averaged."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from torchvision import transforms

from jaxsft.cli import UserError
from jaxsft.data.augment import preprocess
from jaxsft.data.views import Views
from jaxsft.learn.steps import make_eval_step
from jaxsft.models.weights import Preprocessing

TO = Preprocessing(resize_size=19, crop_size=14)  # an odd number of pixels between the crops


class OfPlaces:
    """A network to whom it matters where a pixel lies: [N, S, S, 3] to 5 logits."""

    weights = np.random.default_rng(0).normal(0, 0.1, (TO.crop_size, TO.crop_size, 3, 5))

    def apply(self, variables: dict[str, Any], images: jax.Array, train: bool) -> jax.Array:
        return jax.numpy.einsum("nhwc,hwck->nk", images, self.weights, precision="highest")

    def in_torch(self, images: torch.Tensor) -> torch.Tensor:
        """Of [N, 3, S, S]."""
        return torch.einsum("nchw,hwck->nk", images, torch.from_numpy(self.weights))


@pytest.mark.parametrize("tempered", [1.0, 1.7])
@pytest.mark.parametrize("tta", ["flip", "crops", "flip+crops"])
def test_views_are_torchvisions(tta: str, tempered: float) -> None:
    """FiveCrop and TenCrop of the same pixels, through torch's network, and the mean of the probabilities."""
    views = Views.of(tta, TO)
    assert views is not None
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (6, 33, 24, 3), np.uint8), rng.integers(0, 5, 6).astype(np.int32)
    with jax.enable_x64(True):
        prepared = views.prepared(TO)
        square = np.asarray(preprocess(images, prepared), np.float64).transpose(0, 3, 1, 2)
        pixels = torch.from_numpy(square)
        make = {
            "flip": lambda x: (x, transforms.functional.hflip(x)),
            "crops": transforms.FiveCrop(TO.crop_size),
            "flip+crops": transforms.TenCrop(TO.crop_size),
        }
        logits = [OfPlaces().in_torch(view) for view in make[tta](pixels)]
        assert len(logits) == len(views)
        expected = torch.stack([torch.softmax(each / tempered, 1) for each in logits]).mean(0)
        untempered = torch.stack([torch.softmax(each, 1) for each in logits]).mean(0)
        one = lambda x, number: views.one(x.astype(np.float64), TO.crop_size, number)
        step = make_eval_step(
            OfPlaces(),
            prepared,
            top=5,
            temperature=tempered,
            views=one,
            number_of_views=len(views),  # type: ignore[arg-type]
        )
        batch = {"image": images, "label": labels, "example": np.arange(6), "mask": labels >= 0}
        found = jax.device_get(jax.jit(step)({}, {}, batch))
    order = torch.argsort(expected, dim=1, descending=True)
    np.testing.assert_array_equal(found["classes"], order)
    np.testing.assert_allclose(found["probabilities"], expected.gather(1, order), rtol=1e-10)
    np.testing.assert_allclose(found["loss"], -np.log(untempered.numpy()[np.arange(6), labels]), rtol=1e-10)
    np.testing.assert_allclose(found["nll"], -np.log(expected.numpy()[np.arange(6), labels]), rtol=1e-10)


def test_views_are_in_torchvisions_order() -> None:
    images = np.random.default_rng(3).normal(0, 1, (2, 19, 19, 3)).astype(np.float32)
    views, crop = Views(flip=True, crops=True), transforms.TenCrop(TO.crop_size)
    for number, expected in enumerate(crop(torch.from_numpy(images.transpose(0, 3, 1, 2)))):
        found = views.one(images, TO.crop_size, np.int32(number))  # type: ignore[arg-type]
        np.testing.assert_array_equal(np.asarray(found).transpose(0, 3, 1, 2), expected)


@pytest.mark.parametrize("tempered", [1.0, 0.6])
def test_views_of_several_labels(tempered: float) -> None:
    rng = np.random.default_rng(2)
    labels = (rng.random((6, 5)) < 0.5).astype(np.uint8)
    with jax.enable_x64(True):
        pixels = rng.normal(0, 1, (6, TO.crop_size, TO.crop_size, 3))
        views = Views(flip=True, crops=False)
        one = lambda x, number: views.one(x, TO.crop_size, number)
        step = make_eval_step(OfPlaces(), None, temperature=tempered, views=one, number_of_views=2)  # type: ignore[arg-type]
        batch = {"image": pixels, "label": labels, "example": np.arange(6), "mask": np.ones(6, bool)}
        found = jax.device_get(jax.jit(step)({}, {}, batch))
    both = [torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (pixels, pixels[:, :, ::-1])]
    expected = torch.stack([torch.sigmoid(OfPlaces().in_torch(x) / tempered) for x in both]).mean(0)
    np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-10)
    untempered = torch.stack([torch.sigmoid(OfPlaces().in_torch(x)) for x in both]).mean(0)
    loss = torch.nn.BCELoss(reduction="none")(untempered, torch.from_numpy(labels).double()).mean(1)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-10)


@pytest.mark.parametrize(
    ("text", "to", "said"),
    [
        ("mirror", TO, "--tta is 'mirror'; it must be flip, crops or flip+crops"),
        ("flip+flip", TO, "--tta is 'flip+flip'; it must"),
        ("crops", Preprocessing(32, 32), "has no crops to take: images are resized to 32 px, and the model sees 32"),
    ],
)
def test_views_that_there_are_not(text: str, to: Preprocessing, said: str) -> None:
    with pytest.raises(UserError) as error:
        Views.of(text, to)
    assert said in str(error.value)
    assert Views.of("", TO) is None
