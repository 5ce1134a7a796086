"""Maps and attributions are those of pytorch-grad-cam and captum for torchvision's own networks with the same weights.

Maps, from 0 to 1, and attributions, in units of the logit, may differ by 1e-4, which is what is promised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import captum.attr
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import pytorch_grad_cam
import torch
import torchvision
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scipy.stats import spearmanr

from jaxsft.cli import UserError
from jaxsft.data.base import Options
from jaxsft.data.embedded import open_sample
from jaxsft.interpret import baseline, feature_map, gradcam, integrated_gradients, occlusion
from jaxsft.interpret.feature_map import FeatureMap
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.family import init_variables, variable_shapes
from jaxsft.models.weights import Preprocessing
from jaxsft.parity import networks, oracle, ours
from jaxsft.run.prediction import read_image
from tests import small
from tests.narrow import NARROW, SIDE

CLASSES = 10
NEAR = 1e-4
# Of the largest attribution. Where a value lies at the bend of a ReLU roundings decide whether its gradient passes:
# of a trained ResNet-18 torch's own float32 leaves its own float64 by 3e-4 of the largest attribution, us by 2e-4.
BENT = 1e-3
# Of fresh deep networks torch's own float32 leaves its own float64 by 5e-3, and a ReLU6 bends twice (1.5e-3 of the
# largest), so that IN_FLOAT64 are compared in that.
# There captum rounds the weights of its steps to float32, which leaves 6e-8.
ROUNDED = 1e-6
STEPS = 16
CAMS = ("GradCAM", "GradCAMPlusPlus")
networks.NOT_IN_TORCHVISION[small.ARCH] = small.in_torch
QUICK = (small.ARCH, "narrow_vit")
DEEP = ("resnet18", "vgg11_bn", "convnext_tiny", "vit_b_32", "swin_t", "densenet121")
IN_FLOAT64 = ("narrow_mobilenet_v2", *DEEP)


class Both:
    """A network with the same weights in torch and here, images to ask about, and a class for each: its own."""

    def __init__(self, arch: str, theirs: torch.nn.Module, images: np.ndarray, dtype: Any = np.float32):
        size, self.arch, self.images = images.shape[1], arch, images.astype(dtype)
        self.theirs = theirs = theirs.eval().to(torch.from_numpy(self.images).dtype)
        self.to = Preprocessing(size, size)
        tensors = oracle.state(theirs)
        classes = len(list(tensors.values())[-1])
        self.model: nn.Module = ARCHITECTURES[arch](num_classes=classes, dtype=dtype, param_dtype=dtype)
        self.variables = ours.variables(self.model, tensors, arch, size)
        mean, std = (np.asarray(values, np.float32) for values in (self.to.mean, self.to.std))
        self.input = oracle.nchw((self.images / 255 - mean) / std)
        with torch.no_grad():
            self.logits = theirs(self.input).numpy()
        self.classes = self.logits.argmax(1).astype(np.int32)
        self.targets = torch.from_numpy(self.classes).long()

    def where(self, layer: str = "") -> FeatureMap:
        return feature_map.find(self.model, self.arch, self.variables, self.to.crop_size, layer)

    def maps(self, method: str, where: FeatureMap) -> tuple[np.ndarray, np.ndarray]:
        step = gradcam.make(self.model, where, self.to, plus_plus=method == "GradCAMPlusPlus")
        return tuple(map(np.asarray, step(self.variables, self.images, self.classes)))  # type: ignore[return-value]

    def their_maps(self, method: str, where: FeatureMap) -> np.ndarray:
        layer = self.theirs.get_submodule(where.layer)
        with getattr(pytorch_grad_cam, method)(self.theirs, [layer], reshape_transform=reshape_of(layer, where)) as cam:
            return cam(self.input.clone(), [ClassifierOutputTarget(int(k)) for k in self.classes])


def reshape_of(layer: torch.nn.Module, where: FeatureMap) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Tokens, or images with the channels last, as [N, C, H, W]: what users of pytorch-grad-cam write themselves."""
    if len(where.shape) == 2:
        return lambda x: (
            x[:, int(where.class_token) :].reshape(len(x), where.height, where.width, -1).permute(0, 3, 1, 2)
        )
    return (lambda x: x.permute(0, 3, 1, 2)) if oracle.channels_last(layer) else None


class Copy(torch.nn.Module):
    """What DenseNet's last ReLU may work on in place: else pytorch-grad-cam would see its result as norm5's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def built(arch: str, size: int) -> torch.nn.Module:
    model = networks.build(arch, CLASSES, image_size=size)
    if "densenet" in arch:
        model.get_submodule("features").add_module("copy", Copy())
    return model


def noise(size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (3, size, size, 3), np.uint8)


def pictures(size: int) -> np.ndarray:
    """Real ones, of the embedded test images."""
    found = open_sample("", "test[:6]", Options()).images
    return np.stack([read_image(PIL.Image.fromarray(image), Preprocessing(size, size)) for image in found])


@functools.cache
def both(arch: str, dtype: Any = np.float32) -> Both:
    size = SIDE if arch in NARROW or arch == small.ARCH else 64
    return Both(arch, built(arch, size), noise(size), dtype)


def archs(*quick: str) -> list[Any]:
    """All networks, those that are not `quick` behind `full`."""
    rest = [arch for arch in (*QUICK, *NARROW, *DEEP) if arch not in quick]
    return [*quick, *(pytest.param(arch, marks=pytest.mark.full) for arch in dict.fromkeys(rest))]


@pytest.mark.parametrize("method", CAMS)
@pytest.mark.parametrize("arch", archs(*QUICK))
def test_maps_are_those_of_pytorch_grad_cam(arch: str, method: str) -> None:
    one = both(arch)
    where = one.where()
    logits, found = one.maps(method, where)
    expected = one.their_maps(method, where)
    assert np.abs(logits - one.logits).max() <= NEAR * np.abs(one.logits).max()
    assert found.shape == expected.shape and found.dtype == np.float32
    assert expected.max() > 0.9 or (method, arch) == ("GradCAM", "narrow_vgg")  # all of it below 0: a map of zeros
    assert np.abs(found - expected).max() <= NEAR


@pytest.mark.parametrize("start", ["mean", pytest.param("black", marks=pytest.mark.full)])
@pytest.mark.parametrize("arch", archs(small.ARCH))
def test_integrated_gradients_are_those_of_captum(arch: str, start: str) -> None:
    with jax.enable_x64(arch in IN_FLOAT64):
        one = both(arch, np.float64 if arch in IN_FLOAT64 else np.float32)
        found = integrated_gradients.make(one.model, one.to, STEPS, start)(one.variables, one.images, one.classes)
    nothing = torch.from_numpy(np.array(baseline.make(start, one.to), one.images.dtype))[None, :, None, None]
    expected, delta = captum.attr.IntegratedGradients(one.theirs).attribute(
        one.input, nothing.expand_as(one.input), one.targets, n_steps=STEPS, return_convergence_delta=True
    )
    values = expected.detach().numpy().transpose(0, 2, 3, 1)
    largest = np.abs(values).max()
    near = ROUNDED * largest if arch in IN_FLOAT64 else min(NEAR, BENT * largest)
    assert np.abs(found.values - values).max() <= near
    # Completeness is missed by as much, in units of what the attributions are summed up from.
    assert np.abs(found.delta() - delta.numpy()).max() <= near / largest * np.abs(values).sum((1, 2, 3)).max()


@pytest.mark.parametrize(
    ("window", "stride", "cover"), [(12, 7, "mean"), pytest.param(9, 9, "white", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("arch", archs(small.ARCH))
def test_occlusion_is_that_of_captum(arch: str, window: int, stride: int, cover: str) -> None:
    """Also where the last window of a row reaches over the edge: 12 + 3 * 7 px are more than 32."""
    one = both(arch)
    found = np.asarray(occlusion.make(one.model, one.to, window, stride, cover)(one.variables, one.images, one.classes))
    nothing = torch.from_numpy(np.array(baseline.make(cover, one.to)))[None, :, None, None]
    expected = captum.attr.Occlusion(one.theirs).attribute(
        one.input, (3, window, window), (3, stride, stride), nothing, one.targets, perturbations_per_eval=4
    )
    assert np.abs(found - expected.numpy()[:, 0]).max() <= NEAR * max(1, float(np.abs(one.logits).max()))


def test_attributions_are_complete_in_enough_steps() -> None:
    """A smooth network: Gauss-Legendre quadrature misses the change of the logit by rounding alone."""
    one = both("narrow_vit")
    found = integrated_gradients.make(one.model, one.to, 60)(one.variables, one.images, one.classes)
    change = np.abs(np.asarray(found.logit) - np.asarray(found.start))
    assert (np.abs(found.delta()) <= NEAR * change).all()
    rough = integrated_gradients.make(one.model, one.to, 2)(one.variables, one.images, one.classes)
    assert (np.abs(rough.delta()) > NEAR * change).any()  # that enough are needed


def test_before_a_mean_and_a_linear_layer_grad_cam_is_cam() -> None:
    """Zhou et al. 2016 (arXiv:1512.04150): there the channels' weights are those of the output layer."""
    one = both(small.ARCH)
    where = one.where()
    x = one.input.numpy().transpose(0, 2, 3, 1)
    _, values = feature_map.apply(one.model, where, one.variables, jnp.asarray(x), jnp.zeros((3, *where.shape)))
    kernel = one.variables["params"]["fc"]["kernel"][:, one.classes]
    cam = gradcam.scaled(jnp.einsum("nhwc,cn->nhw", values, kernel, precision="highest"), SIDE)
    assert np.abs(one.maps("GradCAM", where)[1] - cam).max() <= NEAR


def others(one: Both) -> Any:
    """Other variables of the same network: fresh ones."""
    return jax.tree.map(jnp.asarray, init_variables(one.model, 3, one.to.crop_size))


def correlation(found: np.ndarray, other: np.ndarray) -> float:
    """The mean over images of Spearman's rank correlation of two sets of maps."""
    return float(np.mean([spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(found, other, strict=True)]))


def check_randomised(one: Both, most: float) -> None:
    """Adebayo et al. 2018 (arXiv:1810.03292): what does not depend on the weights explains no model."""
    cam = gradcam.make(one.model, one.where(), one.to)
    gradients = integrated_gradients.make(one.model, one.to, 8)
    cover = occlusion.make(one.model, one.to, one.to.crop_size // 8, one.to.crop_size // 8)
    for method in (
        lambda v: cam(v, one.images, one.classes)[1],
        lambda v: gradients(v, one.images, one.classes).values.sum(-1),
        lambda v: cover(v, one.images, one.classes),
    ):
        found, again, other = (np.asarray(method(v)) for v in (one.variables, one.variables, others(one)))
        assert correlation(found, again) > 0.999
        assert abs(correlation(found, other)) < most


def test_randomised_weights_give_other_maps() -> None:
    check_randomised(both(small.ARCH), 0.6)


@pytest.mark.full
def test_a_trained_network_on_real_pictures(cifar7: Path) -> None:
    theirs = torchvision.models.resnet18(num_classes=7)
    theirs.load_state_dict(torch.load(cifar7, weights_only=True))
    one = Both("resnet18", theirs, pictures(96))
    for method in CAMS:
        for layer in ("", "layer3", "layer4.0.conv2"):
            where = one.where(layer)
            # conv2 is followed by a batch norm that works on a copy, and layers by what does not change them
            assert np.abs(one.maps(method, where)[1] - one.their_maps(method, where)).max() <= NEAR
    found = integrated_gradients.make(one.model, one.to, 50)(one.variables, one.images, one.classes)
    expected = captum.attr.IntegratedGradients(theirs).attribute(one.input, target=one.targets, n_steps=50)
    values = expected.detach().numpy().transpose(0, 2, 3, 1)
    assert np.abs(found.values - values).max() <= min(NEAR, BENT * np.abs(values).max())
    more = integrated_gradients.make(one.model, one.to, 300)(one.variables, one.images, one.classes)
    change = np.abs(np.asarray(more.logit) - np.asarray(more.start))
    assert np.median(np.abs(more.delta()) / change) < 0.01
    check_randomised(one, 0.5)


def test_layers_have_torchs_names() -> None:
    one = both(small.ARCH)
    for layer, name in (("", "layer1.0"), ("layer1", "layer1.0"), ("layer1.0.conv1", "layer1.0.conv1"), ("bn1", "bn1")):
        assert one.where(layer).layer == name
        assert isinstance(one.theirs.get_submodule(name), torch.nn.Module)
    for layer, message in (
        ("layer9", "one_block has no layer 'layer9'; did you mean 'layer1.0'"),
        ("fc", r"layer fc of one_block gives no map of the image but \[10\]; name a layer that gives a map"),
    ):
        with pytest.raises(UserError, match=message):
            one.where(layer)
    with pytest.raises(UserError, match="one_block has no map of more than one pixel of images of 1 px"):
        feature_map.find(one.model, one.arch, one.variables, 1)


@pytest.mark.full
def test_rematerialisation_changes_nothing() -> None:
    one = both(small.ARCH)
    before = one.maps("GradCAM", one.where())[1]
    again = Both(small.ARCH, one.theirs, one.images)
    again.model = one.model.clone(remat=True)
    np.testing.assert_array_equal(again.maps("GradCAM", again.where())[1], before)


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_a_map(arch: str) -> None:
    """torch has a module of the name, and the map is one of the image, 224 px of it; of most 7 x 7."""
    model = ARCHITECTURES[arch](num_classes=2)
    where = feature_map.find(model, arch, variable_shapes(model), 224)
    assert min(where.height, where.width) >= 7 and where.height == where.width
    if arch in torchvision.models.list_models():
        with torch.device("meta") if "regnet" not in arch else torch.device("cpu"):
            theirs = torchvision.models.get_model(arch)
        assert theirs.get_submodule(where.layer) is not None
