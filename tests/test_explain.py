"""`jaxsft.explain`: maps and attributions are pytorch-grad-cam's and captum's on the same weights, and can be looked at.

Both packages compute with torchvision's own networks; images, weights and classes are the same. Map by map the largest
difference may be 1e-4 of the largest value, and is about 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable

import captum.attr
import flax.linen as nn
import numpy as np
import pytest
import pytorch_grad_cam
import torch

from jaxsft.interpret import feature_map, gradcam, integrated_gradients, occlusion
from jaxsft.interpret.feature_map import FeatureMap
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.weights import Preprocessing
from jaxsft.parity import networks, oracle, ours
from tests.narrow import NARROW, SIDE

CLASSES = 10
NEAR = 1e-4  # of the largest: what is promised; float32 alone leaves 1e-5 in the deepest of these networks
TO = Preprocessing(SIDE, SIDE)
# One of each kind of map by default: after a block, a pooling module, tokens, channels last, a norm; the rest `full`.
QUICK = ("narrow_resnet", "narrow_vgg", "narrow_vit", "narrow_swin", "narrow_convnext", "narrow_shufflenet_v2")
SOME = [arch if arch in QUICK else pytest.param(arch, marks=pytest.mark.full) for arch in NARROW]


class Both:
    """A network with the same weights in torch and here, and images to ask about."""

    def __init__(self, arch: str, theirs: torch.nn.Module, to: Preprocessing = TO, images: np.ndarray | None = None):
        self.arch, self.theirs, self.to = arch, theirs.eval(), to
        tensors = oracle.state(theirs)
        classes = len(next(reversed(tensors.values())))
        self.model: nn.Module = ARCHITECTURES[arch](num_classes=classes)
        self.variables = ours.variables(self.model, tensors, arch, to.crop_size)
        if images is None:
            images = np.random.default_rng(1).integers(0, 256, (3, to.crop_size, to.crop_size, 3), np.uint8)
        self.images = images
        self.classes = np.random.default_rng(2).integers(0, classes, len(images)).astype(np.int32)
        normal = (images / np.float32(255) - np.float32(to.mean)) / np.float32(to.std)
        self.input = oracle.nchw(normal.astype(np.float32))
        self.targets = torch.from_numpy(self.classes).long()

    def where(self, layer: str = "") -> FeatureMap:
        return feature_map.find(self.model, self.arch, self.variables, self.to.crop_size, layer)

    def maps(self, method: str, where: FeatureMap) -> np.ndarray:
        step = gradcam.make(self.model, where, self.to, plus_plus=method == "GradCAMPlusPlus")
        logits, maps = step(self.variables, self.images, self.classes)
        with torch.no_grad():
            expected = self.theirs(self.input).numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=NEAR * np.abs(expected).max())
        return np.asarray(maps)

    def their_maps(self, method: str, where: FeatureMap) -> np.ndarray:
        targets = [pytorch_grad_cam.utils.model_targets.ClassifierOutputTarget(int(k)) for k in self.classes]
        layer = self.theirs.get_submodule(where.layer)
        cam = getattr(pytorch_grad_cam, method)(self.theirs, [layer], reshape_transform=reshape_of(layer, where))
        return cam(self.input.clone(), targets)


def reshape_of(layer: torch.nn.Module, where: FeatureMap) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What pytorch-grad-cam's users write for transformers: tokens, or images with the channels last, as [N, C, H, W]."""
    if len(where.shape) == 2:
        first = int(where.class_token)
        return lambda x: x[:, first:].reshape(len(x), where.height, where.width, -1).permute(0, 3, 1, 2)
    return (lambda x: x.permute(0, 3, 1, 2)) if oracle.channels_last(layer) else None


class Copy(torch.nn.Module):
    """What is in the place of a tensor that torchvision would change: DenseNet's last ReLU works in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def built(arch: str) -> torch.nn.Module:
    model = networks.build(arch, CLASSES, image_size=SIDE)
    if "densenet" in arch:
        model.get_submodule("features").add_module("copy", Copy())
    return model


@pytest.fixture(scope="module", params=SOME)
def both(request: pytest.FixtureRequest) -> Both:
    return Both(request.param, built(request.param))


@pytest.mark.parametrize("method", ["GradCAM", "GradCAMPlusPlus"])
def test_maps_are_those_of_pytorch_grad_cam(both: Both, method: str) -> None:
    where = both.where()
    assert where.height * where.width > 1
    found, expected = both.maps(method, where), both.their_maps(method, where)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert expected.max((1, 2)).max() > 0.9
    assert np.abs(found - expected).max() <= NEAR
    print(both.arch, method, where.layer, np.abs(found - expected).max())


def test_integrated_gradients_are_those_of_captum(both: Both) -> None:
    step = integrated_gradients.make(both.model, both.to, steps=20)
    found = step(both.variables, both.images, both.classes)
    theirs = captum.attr.IntegratedGradients(both.theirs)
    expected, delta = theirs.attribute(
        both.input, target=both.targets, n_steps=20, return_convergence_delta=True, internal_batch_size=30
    )
    expected = expected.detach().numpy().transpose(0, 2, 3, 1)
    assert np.abs(found.values - expected).max() <= NEAR * np.abs(expected).max()
    print(
        both.arch,
        np.abs(found.values - expected).max() / np.abs(expected).max(),
        found.delta(),
        delta.numpy(),
        found.logit - found.start,
    )


def test_occlusion_is_that_of_captum(both: Both) -> None:
    step = occlusion.make(both.model, both.to, 12, 7)
    found = np.asarray(step(both.variables, both.images, both.classes))
    theirs = captum.attr.Occlusion(both.theirs)
    expected = theirs.attribute(
        both.input, (3, 12, 12), strides=(3, 7, 7), target=both.targets, perturbations_per_eval=3
    )
    expected = expected.numpy()[:, 0]
    assert np.abs(found - expected).max() <= NEAR * np.abs(expected).max()
    print(both.arch, np.abs(found - expected).max() / np.abs(expected).max())
