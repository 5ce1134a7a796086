"""Every family computes what torchvision's network of the same shape does, and a broken detail of it is named.

Narrow networks, in float64 where only rounding may differ; dropout and stochastic depth are on, by our masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.learn.objective import network_keys, step_key
from jaxsft.models import (
    attention,
    convnext,
    convolution,
    densenet,
    efficientnet,
    layers,
    mobilenetv2,
    mobilenetv3,
    regnet,
    shufflenetv2,
    swin_transformer,
    vgg,
    vision_transformer,
    windows,
)
from jaxsft.models.blocks import SqueezeExcitation as Squeeze
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.models.family import variable_shapes
from jaxsft.models.initial import make_model
from jaxsft.models.layers import LayerNorm, Linear
from jaxsft.models.stochastic import Dropout
from jaxsft.parity import compare, networks, oracle, ours
from jaxsft.parity.__main__ import precision
from jaxsft.parity.compare import Options
from jaxsft.parity.table import Row, first_failure
from tests.narrow import NARROW, SIDE

CLASSES = 10
# What is compiled and compared by default; the others, which are much like one of these, behind `full`.
LIKE_OTHERS = ("narrow_resnet", "narrow_regnet_x", "narrow_efficientnet")
SOME = [pytest.param(arch, marks=pytest.mark.full) if arch in LIKE_OTHERS else arch for arch in NARROW]
UPDATED = ("narrow_vgg_bn", "narrow_vit", *LIKE_OTHERS)
RECOMPUTED = ("narrow_vgg", "narrow_densenet")  # whose gradient is compared by default
# How many modules draw, where some do.
DRAWING = {
    "narrow_vgg": 2,
    "narrow_vgg_bn": 2,
    "narrow_mobilenet_v2": 1,
    "narrow_mobilenet_v3": 1,
    "narrow_efficientnet": 2,
    "narrow_efficientnet_v2": 2,
    "narrow_convnext": 2,
    "narrow_vit": 7,
    "narrow_swin": 3,
    "narrow_swin_v2": 3,
}


@pytest.fixture(autouse=True)
def _plain_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a convolution computes has tests of its own, and takes most of the time to compile."""
    monkeypatch.setattr(layers, "conv2d", convolution.plain)


def parts(arch: str, side: int = SIDE, width: int = SIDE) -> tuple[Options, Any, Any, Any]:
    """What the parts of a comparison take."""
    options = Options(arch, "float64", steps=2, batch_size=4, image_size=(side, width))
    torch_model = networks.build(arch, CLASSES, image_size=side).double()
    model = compare.model_for(options, CLASSES)
    return options, model, ours.variables(model, oracle.state(torch_model), arch, options.image_size), torch_model


@pytest.mark.parametrize("arch", SOME)
def test_activations_and_gradients_are_torchs(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the command compares; updates, for which another program is compiled, of those in UPDATED."""
    updated = arch in UPDATED
    both = compare.recipes(CLASSES)
    monkeypatch.setattr(compare, "recipes", lambda _: both[1:] if updated else ())
    with precision("float64"):
        options, model, values, torch_model = parts(arch)
        assert (failure := first_failure(compare.compare(options, model, torch_model))) is None, failure
        masks = ours.drawer(model, arch, values)(compare.inputs(options, CLASSES, 0).images, 0)
        assert len(masks) == DRAWING.get(arch, 0)


@pytest.mark.parametrize("arch", [arch for arch in NARROW if not family_of(arch).resized])
def test_odd_sizes(arch: str) -> None:
    with precision("float64"):
        assert (failure := first_failure(compare.eval_rows(*parts(arch, 37, 50)))) is None, failure


def swapped(module: Any, name: str, by: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(module, name, by)


def told(module: Any, name: str, **other: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """`module.name` with other arguments than it is given."""
    real = getattr(module, name)
    return swapped(module, name, lambda *arguments, **named: real(*arguments, **{**named, **other}))


def zero_padded(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, size - x.shape[2]), (0, 0)))


def newest_first(features: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.concatenate(features[::-1], -1)


class RowByRow(swin_transformer.PatchMerging):
    """The four pixels of a cell in the order in which one reads."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, height, width, channels = x.shape
        cells = x.reshape(n, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        norm = LayerNorm(1e-5, self.param_dtype, name="norm")(cells.reshape(n, height // 2, width // 2, -1))
        return Linear(2 * channels, use_bias=False, param_dtype=self.param_dtype, name="reduction")(norm)


EVAL, TRAIN = compare.eval_rows, compare.train_rows
tanh = jax.nn.gelu  # Flax's default
# What is broken: the network, how, the part of the comparison that meets it, and the row that must say so first.
BROKEN: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None], Callable[..., Iterator[Row]], str]] = {
    "pooling of a small image": (
        "narrow_vgg", swapped(vgg, "adaptive_average_pool", zero_padded), EVAL, "eval/activation/classifier.0"),
    "rate of dropout": (
        "narrow_vgg", swapped(vgg, "Dropout", lambda rate, name: Dropout(0.4, name=name)), TRAIN,
        "train/activation/classifier.3"),
    "ReLU for ReLU6": (
        "narrow_mobilenet_v2", swapped(mobilenetv2, "relu6", nn.relu), EVAL, "eval/activation/features.0"),
    "gate of the squeeze": (
        "narrow_mobilenet_v3", swapped(mobilenetv3, "hard_sigmoid", nn.sigmoid), EVAL,
        "eval/activation/features.2.block.2"),
    "epsilon of batch norm": (
        "narrow_mobilenet_v3", told(mobilenetv3, "BatchNorm", epsilon=1e-5), EVAL, "eval/activation/features.0.1"),
    "activation of the squeeze": (
        "narrow_efficientnet", swapped(efficientnet, "SqueezeExcitation", lambda width, _, **k: Squeeze(width, **k)),
        EVAL, "eval/activation/features.1.0.block.1.fc2"),
    "momentum of batch norm": (
        "narrow_efficientnet_v2", told(efficientnet, "BatchNorm", momentum=0.01), TRAIN,
        "train/running_mean/features.0.1.running_mean"),
    "squeeze of the other activation": (
        "narrow_regnet_y", told(regnet, "SqueezeExcitation", activation=nn.silu), EVAL,
        "eval/activation/trunk_output.block1.block1-0.f.se.fc2"),
    "order of the channels": (
        "narrow_densenet", swapped(densenet, "side_by_side", newest_first), EVAL,
        "eval/activation/features.denseblock1.denselayer2.norm1"),
    "tanh GELU of ConvNeXt": (
        "narrow_convnext", swapped(convnext, "gelu", tanh), EVAL, "eval/activation/features.1.0.block.5"),
    "epsilon of layer norm": (
        "narrow_convnext", swapped(convnext, "EPSILON", 1e-5), EVAL, "eval/activation/features.0.1"),
    "tanh GELU of ViT": (
        "narrow_vit", swapped(attention, "gelu", tanh), EVAL,
        "eval/activation/encoder.layers.encoder_layer_0.mlp.3"),
    "epsilon of ViT's layer norm": (
        "narrow_vit", swapped(vision_transformer, "EPSILON", 1e-5), EVAL,
        "eval/activation/encoder.layers.encoder_layer_0.ln_1"),
    "order of merging": (
        "narrow_swin", swapped(swin_transformer, "PatchMerging", RowByRow), EVAL, "eval/activation/features.2.norm"),
    "shift of a single window": (
        "narrow_swin", swapped(windows, "shift_along", lambda shift, window, side: shift), EVAL,
        "eval/activation/features.3.1.attn"),
    "no shuffle of the channels": (
        "narrow_shufflenet_v2", swapped(shufflenetv2, "channel_shuffle", lambda x: x), EVAL,
        "eval/activation/stage2.0"),
    "clamp of the logits' scale": (
        "narrow_swin_v2", swapped(windows, "MOST", 10.0), EVAL, "eval/activation/features.1.0.attn"),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_detail_is_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, broken, part, expected = BROKEN[case]
    broken(monkeypatch)
    with precision("float64"):
        first = first_failure(part(*parts(arch)))
    assert first is not None
    assert first.name == expected


def gradient(arch: str, variables: Any, remat: bool) -> Callable[[Any], Any]:
    """Of a loss in training, by the parameters."""
    model = ARCHITECTURES[arch](num_classes=CLASSES, remat=remat)
    keys = network_keys(step_key(0, jnp.int32(0)), jnp.arange(4))

    def loss(params: Any) -> jax.Array:
        values = {**variables, "params": params}
        logits, _ = model.apply(values, IMAGES, train=True, keys=keys, mutable=["batch_stats"])
        return jnp.square(logits).sum()

    return jax.grad(loss)


@pytest.mark.parametrize("arch", NARROW)
def test_blocks_can_be_recomputed(arch: str) -> None:
    model = ARCHITECTURES[arch](num_classes=CLASSES, remat=True)
    keys = network_keys(step_key(0, jnp.int32(0)), jnp.arange(4))
    apply = partial(model.apply, train=True, keys=keys, mutable=["batch_stats"])
    assert "remat" in str(jax.make_jaxpr(apply)(drawn(arch), IMAGES))


@pytest.mark.parametrize(
    "arch", [arch if arch in RECOMPUTED else pytest.param(arch, marks=pytest.mark.full) for arch in NARROW]
)
def test_recomputation_changes_no_gradient(arch: str) -> None:
    variables = drawn(arch)
    both = jax.jit(lambda params: [gradient(arch, variables, remat)(params) for remat in (False, True)])
    plain, again = both(variables["params"])
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain))
    # the same sums; XLA may contract them otherwise: roundings of float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), plain, again)


def drawn(arch: str) -> Any:
    """Variables of an architecture, without a program that makes them."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        positive = path[-1].key in ("scale", "var")
        values = rng.uniform(0.5, 1.5, leaf.shape) if positive else rng.normal(0, 0.2, leaf.shape)
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(ARCHITECTURES[arch](num_classes=CLASSES), SIDE))


@pytest.mark.parametrize("arch", SOME)
def test_bfloat16_is_float32_but_for_rounding(arch: str) -> None:
    model = ARCHITECTURES[arch](num_classes=CLASSES)
    variables = drawn(arch)
    forward = jax.jit(lambda images: [model.clone(dtype=d).apply(variables, images, train=False) for d in DTYPES])
    exact, rounded = forward(IMAGES)
    assert rounded.dtype == jnp.float32  # the head's
    # a rounding of bfloat16 is 2^-9, and there are some ten in a row; version 2 of Swin takes cosines of rounded
    # vectors ten times and more as logits
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=0.1 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("arch", NARROW)
def test_a_batch_of_any_size_can_be_exported(arch: str) -> None:
    model = ARCHITECTURES[arch](num_classes=CLASSES)
    variables = drawn(arch)
    shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), SIDE, SIDE, 3), jnp.float32)
    exported = jax.export.export(jax.jit(lambda images: model.apply(variables, images, train=False)))(shape)
    assert exported.out_avals[0].shape[1] == CLASSES


IMAGES = np.random.default_rng(0).standard_normal((4, SIDE, SIDE, 3), np.float32)
DTYPES = (jnp.float32, jnp.bfloat16)


def test_depths_grow_towards_the_head() -> None:
    """Every parameter has a depth, the least is 0, and none lies above the head."""
    for arch in NARROW:
        family = family_of(arch)
        paths = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes(arch))]
        depths = {path: family.stage_of(path) for path in paths}
        assert min(depths.values()) == 0, arch
        assert max(depths.values()) == family.stage_of(family.head), arch


def shapes(arch: str) -> Any:
    return variable_shapes(ARCHITECTURES[arch](num_classes=3), SIDE)["params"]


# An architecture, a rate of it, and torchvision's own.
RATES = (
    ("vgg11", "dropout", 0.5), ("mobilenet_v3_large", "dropout", 0.2), ("efficientnet_b4", "dropout", 0.4),
    ("efficientnet_b0", "stochastic_depth", 0.2), ("densenet121", "dropout", 0.0),
    ("convnext_base", "stochastic_depth", 0.5), ("vit_b_16", "dropout", 0.0), ("swin_s", "stochastic_depth", 0.3),
)  # fmt: skip


def test_rates_are_torchvisions_or_the_configs() -> None:
    for arch, name, own in RATES:
        config = config_module.default()
        config.model.arch = arch
        assert getattr(make_model(config, 3), name) == own, arch
        config.model[name] = 0.25
        assert getattr(make_model(config, 3), name) == 0.25, arch
    for name in ("dropout", "stochastic_depth"):
        config = config_module.default()
        config.model[name] = 0.1
        with pytest.raises(UserError, match=f"config.model.{name} is 0.1, and resnet18 has none"):
            make_model(config, 3)
