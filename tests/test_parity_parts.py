"""Single parts held against torch's: losses, schedules, layers on hostile inputs, whole networks on odd ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from convert import checkpoints
from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.learn.losses import cross_entropy, mean_weight
from jaxsft.learn.schedule import make_schedule
from jaxsft.models import layers, resnet
from jaxsft.models.families import family_of
from jaxsft.models.pooling import max_pool
from jaxsft.parity import compare, networks, oracle, ours
from jaxsft.parity.__main__ import precision
from jaxsft.parity.compare import Options, class_weights
from jaxsft.parity.table import first_failure
from tests.oracle import ALL

RESNETS = set(resnet.ARCHITECTURES)

CLASSES = 10

# (smoothing, class weights)
LOSSES = tuple((s, w) for s in (0.0, 0.1, 0.7) for w in ((), class_weights(CLASSES), (0.0, *[1.0] * (CLASSES - 1))))


def test_cross_entropy_is_torchs() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(scale=4, size=(16, CLASSES)), rng.integers(CLASSES, size=16)
    with jax.enable_x64(True):
        for smoothing, weights in LOSSES:
            weight = torch.tensor(weights, dtype=torch.float64) if weights else None
            found = np.asarray(cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing, weights))
            for reduction in ("none", "mean"):
                loss = nn.CrossEntropyLoss(weight, label_smoothing=smoothing, reduction=reduction)
                expected = loss(torch.from_numpy(logits), torch.from_numpy(labels)).numpy()
                if reduction == "mean":
                    found = found.mean() / (mean_weight(jnp.asarray(labels), weights, None) if weights else 1)
                # float64 roundings of sums over ten classes
                np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-14, err_msg=f"{smoothing} {weights}")


STEPS, WARMUP, PER_EPOCH = 24, 6, 4
schedulers = torch.optim.lr_scheduler

# config.optim.schedule -> torch's, over a number of steps
SCHEDULES: dict[str, Callable[[Any, int], Any]] = {
    "constant": lambda optimizer, steps: schedulers.ConstantLR(optimizer, 1.0),
    "cosine": schedulers.CosineAnnealingLR,
    "linear": lambda optimizer, steps: schedulers.LinearLR(optimizer, 1.0, 0.0, total_iters=steps),
    "step": lambda optimizer, steps: schedulers.StepLR(optimizer, 2 * PER_EPOCH, 0.1),
}


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_torchs(name: str, warmup: int) -> None:
    config = config_module.default()
    config.optim.update({"schedule": name, "lr": 0.3, "warmup_epochs": warmup / PER_EPOCH, "step_epochs": 2.0})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3)
    scheduler = SCHEDULES[name](optimizer, STEPS - warmup)
    if warmup:
        rise = schedulers.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
        scheduler = schedulers.SequentialLR(optimizer, [rise, scheduler], [warmup])
    expected = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    if name == "step" and warmup:  # ours counts epochs from the start of the run, not from the end of the warm-up
        expected[warmup:] = [0.3 * 0.1 ** (t // (2 * PER_EPOCH)) for t in range(warmup, STEPS)]
    rate = make_schedule(config, PER_EPOCH, STEPS)
    with jax.enable_x64(True):
        found = [float(rate(jnp.int32(t))) for t in range(STEPS)]
    # torch multiplies its cosine up step by step, at one rounding each
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-16)
    # float32: a cosine is off by 6e-8 of the full rate
    np.testing.assert_allclose([rate(jnp.int32(t)) for t in range(STEPS)], expected, rtol=1e-6, atol=0.3 * 1e-7)


def hostile(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Activations that break careless arithmetic, float32 NHWC."""
    rng = np.random.default_rng(0)
    if kind == "large mean":  # E[x^2] - E[x]^2 leaves no digit of the variance in float32
        return (100 + 0.01 * rng.standard_normal(shape)).astype(np.float32)
    if kind == "constant":  # the variance is 0 and epsilon all there is
        return np.broadcast_to(rng.standard_normal(shape[-1]).astype(np.float32), shape).copy()
    if kind == "tiny":
        return (1e-6 * rng.standard_normal(shape)).astype(np.float32)
    return (-10 + rng.standard_normal(shape)).astype(np.float32)  # "negative": a zero border would win a max-pool


@pytest.mark.parametrize("kind", ["large mean", "constant", "tiny", "negative"])
def test_layers_on_hostile_activations(kind: str) -> None:
    x = hostile(kind, (4, 9, 13, 6))
    exact = nn.BatchNorm2d(6).double().train()
    expected = exact(oracle.nchw(x).double()).detach().numpy()
    model = layers.BatchNorm()
    values = model.init(jax.random.key(0), x, train=False)
    found, updated = model.apply(values, x, train=True, mutable=["batch_stats"])
    # Against float64. A float32 mean is rounded by up to 6e-8 of itself, and every output is off by as much over the
    # deviation (0.01 at a mean of 100: 6e-4; torch: 4e-4), where E[x^2] - E[x]^2 would be off by 9.
    magnified = float(np.abs(x).max() / np.sqrt(x.astype(np.float64).var((0, 1, 2)) + 1e-5).min())
    bound = 1e-6 + 1e-7 * magnified
    assert np.abs(np.asarray(found).transpose(0, 3, 1, 2) - expected).max() <= bound
    np.testing.assert_allclose(updated["batch_stats"]["mean"], exact.running_mean.numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(updated["batch_stats"]["var"], exact.running_var.numpy(), rtol=1e-5)

    pooled = nn.MaxPool2d(3, 2, 1)(oracle.nchw(x)).numpy()
    np.testing.assert_array_equal(np.asarray(max_pool(jnp.asarray(x))).transpose(0, 3, 1, 2), pooled)


def images(kind: str, dtype: str) -> np.ndarray:
    """Input images of a kind, normalised."""
    rng = np.random.default_rng(1)
    shapes = {"one": (1, 64, 64, 3), "odd": (2, 97, 131, 3), "small": (2, 33, 47, 3)}
    if kind == "grey":  # every image of one grey level
        return np.broadcast_to(rng.uniform(-2, 2, (4, 1, 1, 1)), (4, 64, 64, 3)).astype(dtype)
    if kind == "extreme":
        return (100 + 0.01 * rng.standard_normal((4, 64, 64, 3))).astype(dtype)
    return rng.standard_normal(shapes[kind]).astype(dtype)


@pytest.mark.parametrize("kind", ["one", "odd", "small", "grey", "extreme"])
def test_networks_on_odd_images(kind: str) -> None:
    """Every activation in evaluation and in training, in float64, where nothing but rounding may differ."""
    arch = "resnet10_w16"
    options = Options(arch, "float64")
    with precision("float64"):
        torch_model = networks.build(arch, CLASSES).double()
        model = compare.model_for(options, CLASSES)
        values = ours.variables(model, oracle.state(torch_model), arch)
        x = images(kind, "float64")
        for train in (False,) if kind == "one" else (False, True):
            found = ours.forward(model, arch, values, x, train)
            _, expected = oracle.activations(torch_model, x, train, found)
            for name, value in expected.items():
                # "extreme" and "grey" leave batch norm a variance of rounding size to divide by: 1e-16 / sqrt(1e-5)
                # at each of twelve layers
                tolerance = 1e-9 if kind in ("extreme", "grey") else 1e-12
                assert np.abs(found[name] - value).max() <= tolerance * np.abs(value).max(), f"{kind} {train} {name}"


def check_network(arch: str, weights: str = "", size: tuple[int, int] = (97, 131), train: bool = False) -> None:
    """Logits and every activation of a torchvision network within the command's float32 tolerances.

    With `train` those in training mode, the gradients and running statistics too.
    """
    source = checkpoints.read(weights, arch) if weights else None
    num_classes = source.card.num_classes if source else CLASSES
    if family_of(arch).resized:  # made for one size
        size = (source.card.preprocessing.crop_size if source else size[0],) * 2
    torch_model = networks.build(arch, num_classes, image_size=size[0])
    if source:
        oracle.load(torch_model, source.tensors)
    options = Options(arch, batch_size=4, image_size=size)
    with precision("float32"):
        model = compare.model_for(options, num_classes)
        values = ours.variables(model, oracle.state(torch_model), arch, size)
        for part in (compare.eval_rows, *([compare.train_rows] if train else [])):
            failure = first_failure(part(options, model, values, torch_model))
            assert failure is None, failure


@pytest.mark.parametrize("arch", ["efficientnet_b0", "shufflenet_v2_x1_5", "mobilenet_v2"])
def test_the_drawn_values_show_the_image_and_not_the_rounding(arch: str) -> None:
    """Of torch alone. EfficientNet with statistics that fit no image shows 1e-5 of it; without a bias in its norms
    ShuffleNet's own float32 and float64 part by 1e-5, a comparison's whole tolerance."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = networks.build(arch, CLASSES).eval()
    with torch.no_grad():
        single, exact = model(images), model.double()(images.double())
    largest = exact.abs().max()
    assert (exact.max(0)[0] - exact.min(0)[0]).max() > 0.1 * largest
    assert (single - exact).abs().max() < 5e-6 * largest


def test_a_deep_network_on_images_of_an_odd_size() -> None:
    check_network("resnext50_32x4d")


@pytest.mark.full
@pytest.mark.parametrize("arch", ALL)
def test_all_of_torchvisions_networks(arch: str) -> None:
    """Of the largest, 600 million parameters, evaluation alone is what a machine of 24 GiB bears."""
    side = 56 if arch == "vit_h_14" else 64  # its patches are 14 px wide
    check_network(arch, size=(side, side), train=arch in RESNETS)


@pytest.mark.full
@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "IMAGENET1K_V2"])
@pytest.mark.parametrize("arch", ALL)
def test_all_of_torchvisions_weights(arch: str, weights: str) -> None:
    if weights not in checkpoints.registry(arch):
        pytest.skip(f"torchvision has no {weights} of {arch}")
    try:
        check_network(arch, weights, train=True)
    except UserError as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(str(error))


def test_trained_weights(cifar7) -> None:
    check_network("resnet18", str(cifar7), (64, 64), train=True)
