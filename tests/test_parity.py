"""The comparison itself: it passes, it says what the contract promises, and a broken layer makes it fail by name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import torch
import torchvision
from jax import lax

from jaxsft.cli import UserError
from jaxsft.learn import optim
from jaxsft.models import layers, resnet
from jaxsft.parity import compare, networks, oracle, ours, table
from jaxsft.parity.__main__ import main, precision
from jaxsft.parity.compare import Options
from tests import small
from tests.programs import compiled_into, precisions

SMALL = small.ARCH
networks.NOT_IN_TORCHVISION[SMALL] = small.in_torch
DEEPER = "resnet10_w16"


def parity(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["parity", *map(str, arguments)])
    return main()


@pytest.mark.parametrize(
    ("arch", "dtype", "size", "steps"),
    [
        (SMALL, "float64", "32x48", 4),
        (SMALL, "float32", "64", 10),
        pytest.param(DEEPER, "float64", "32x48", 10, marks=pytest.mark.full),
        pytest.param(DEEPER, "float32", "64", 10, marks=pytest.mark.full),
    ],
)
def test_training_is_torchs(arch: str, dtype: str, size: str, steps: int, monkeypatch, capsys, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    arguments = ["--arch", arch, "--dtype", dtype, "--steps", steps, "--image-size", size, "--json", path]
    with compiled_into(tmp_path / "programs"):
        status = parity(monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert status == 0, printed
    # Whatever the device would do by itself.
    programs = [file.read_text() for file in (tmp_path / "programs").glob("*_compile.mlir")]
    assert {"HIGHEST"} == set().union(*map(precisions, programs))
    assert sum("stablehlo.convolution" in text or "stablehlo.dot_general" in text for text in programs) >= 5
    assert printed.splitlines()[-1].startswith("passed")

    result = json.loads(path.read_text())
    assert result["precision"] == ("float32, products in full" if dtype == "float32" else dtype)
    first, second = printed.splitlines()[:2]
    assert first == f"{arch} on 1 x cpu: {result['precision']}"
    assert second == f"{', '.join(map(' '.join, result['versions'].items()))}; {result['date']}; torch on the CPU"
    assert {"jax", "flax", "torch", "torchvision"} <= result["versions"].keys() and result["device"] == "cpu"
    # A wide tolerance stands beside its reason, which the footer tells.
    wide = [line for line in printed.splitlines() if " 3e-01 " in line]
    assert all(line.endswith("ok  (may jump)") for line in wide) and bool(wide) == (dtype == "float32")
    assert ("\n(may jump): " in printed) == (dtype == "float32") and "\nrelative: the largest |ours" in printed
    assert result["passed"] is True
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == len(result["rows"]), "names are not unique"
    assert all(set(row) == {"name", "max_abs", "relative", "tolerance", "passed"} for row in rows.values())
    tensors = oracle.state(networks.build(arch, 10))
    quantity = {"weight": "parameter", "bias": "parameter"}
    for name in tensors:
        kind = quantity.get(name.rpartition(".")[2], name.rpartition(".")[2])
        for recipe in ("sgd", "nesterov"):
            assert f"{recipe}/step {steps:02d}/{kind}/{name}" in rows
            assert kind != "parameter" or f"{recipe}/step {steps:02d}/momentum/{name}" in rows
        assert kind != "parameter" or f"train/gradient/{name}" in rows
    for name in ("eval/logits", "train/logits", *(f"train/loss/{k}" for k in ("plain", "smoothed", "weighted"))):
        assert name in rows
    for recipe in ("sgd", "nesterov"):
        assert rows[f"{recipe}/evaluation/accuracy"]["max_abs"] == 0
        assert rows[f"{recipe}/step {steps:02d}/loss"]["relative"] <= (1e-4 if dtype == "float32" else 1e-10)
    for phase in ("eval", "train"):
        observed = [name for name in rows if name.startswith(f"{phase}/activation/")]
        blocks, convolutions = (1, 3) if arch == SMALL else (4, 12)
        assert len(observed) == 2 * convolutions + blocks  # a batch norm to each convolution


class SameConv(layers.Conv):
    """Flax's padding instead of torch's."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k = self.kernel_size
        kernel = self.param("kernel", nn.initializers.ones, (k, k, x.shape[-1], self.features), self.param_dtype)
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (self.stride,) * 2, "SAME", dimension_numbers=numbers)


class StrideOnTheFirst(resnet.Bottleneck):
    """The paper's first version: stride on the 1x1 convolution instead of on the 3x3."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(self.norm(name="bn1")(self.conv(self.planes, 1, self.stride, name="conv1")(x), train))
        y = nn.relu(self.norm(name="bn2")(self.conv(self.planes, 3, name="conv2")(y), train))
        y = self.norm(name="bn3")(self.conv(self.planes * self.expansion, 1, name="conv3")(y), train)
        return nn.relu(y + resnet.shortcut(self, x, train))


def same_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "Conv", SameConv)


def biased_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    real = layers.batch_norm

    def biased(x: jax.Array, *rest: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        y, mean, var = real(x, *rest)
        n = x.size // x.shape[-1]
        return y, mean, var * (n - 1) / n

    monkeypatch.setattr(layers, "batch_norm", biased)


def momentum_in_the_wrong_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "BatchNorm", partial(layers.BatchNorm, momentum=0.9))


def decoupled_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(config: Any, rules: Any, rate: Any) -> list[optax.GradientTransformation]:
        c = config.optim
        decay = optax.add_decayed_weights(c.weight_decay)
        return [optax.trace(c.momentum, c.nesterov), decay, optim.scale_by_rate(rate)]

    monkeypatch.setattr(optim, "update_rule", rule)


def step_rows(options: Options, model: resnet.ResNet, values: Any, torch_model: Any) -> Iterator[table.Row]:
    recipe = compare.recipes(10)[0]
    return compare.step_rows(options, model, values, torch_model, recipe, ours.evaluator(model, SMALL))


# How a layer is broken, the part of the comparison that meets it first, and the row that must say so.
BROKEN: tuple[tuple[Callable[..., None], Callable[..., Iterator[table.Row]], str], ...] = (
    (same_padding, compare.eval_rows, "eval/activation/conv1"),
    (biased_variance, compare.train_rows, "train/running_var/bn1.running_var"),
    (momentum_in_the_wrong_sense, compare.train_rows, "train/running_mean/bn1.running_mean"),
    (decoupled_decay, step_rows, "sgd/step 01/momentum/conv1.weight"),
)


@pytest.mark.parametrize(("broken", "part", "expected"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_layer_fails_and_is_named(broken: Any, part: Any, expected: str, monkeypatch) -> None:
    broken(monkeypatch)
    options = Options(SMALL, "float64", steps=1, image_size=(32, 32))
    with precision("float64"):
        torch_model, model = networks.build(SMALL, 10).double(), compare.model_for(options, 10)
        values = ours.variables(model, oracle.state(torch_model), SMALL)
        first = table.first_failure(part(options, model, values, torch_model))
    assert first is not None
    assert first.name == expected


def test_a_failure_is_the_last_line_and_the_exit_status(monkeypatch, capsys, tmp_path: Path) -> None:
    same_padding(monkeypatch)
    path = tmp_path / "rows.json"
    assert parity(monkeypatch, "--arch", SMALL, "--steps", 0, "--image-size", 32, "--json", path) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("the first is eval/activation/conv1")
    result = json.loads(path.read_text())
    assert result["passed"] is False
    assert next(row["name"] for row in result["rows"] if not row["passed"]) == "eval/activation/conv1"


def test_activations_beyond_a_bend_are_counted() -> None:
    """And only where none is a float32 gradient held tightly."""
    ours = {"a": np.array([1e-9, -0.5, 5.9, 7]), "b": np.array([-1.0])}
    torch_ = {"a": np.array([-1e-9, -0.6, 6.1, 8]), "b": np.array([-1.0])}
    assert table.jumps(ours, torch_) == 2 and table.jumps(ours, ours) == 0
    values = {"fc.bias": np.array([1.0]), "x": np.array([2.0])}
    options = Options(SMALL, "float32")
    for moved, passed in ((0, False), (2, True)):
        found = {"fc.bias": np.array([1.0]), "x": np.array([2.1])}  # 5 % of the largest
        row = list(compare.gradient_rows(options, found, values, torch.nn.Identity(), {}, moved))[1]
        assert (row.passed, row.note) == (passed, table.JUMPS if moved else "")
        assert "note" not in row.record()


WRONG = (
    (("--arch", "resnet81"), "did you mean 'resnet18'?"),
    ((), "give either --arch ARCH or --workdir RUN IMAGE_OR_FOLDER"),
    (("--arch", SMALL, "--workdir", "x", "a.png"), "give either --arch ARCH or --workdir RUN IMAGE_OR_FOLDER"),
    (("--arch", SMALL, "a.png"), "IMAGE_OR_FOLDER ... and --workdir RUN go together"),
    (("--workdir", "x"), "IMAGE_OR_FOLDER ... and --workdir RUN go together"),
    (("--workdir", "x", "none.png"), "none.png can't be read: No such file or directory; name images"),
    (("--workdir", "x", __file__), "x holds no run"),
    (("--arch", SMALL, "--batch-size", 1), "batch norm trains on 2 images"),
    (("--arch", SMALL, "--image-size", 16), "the smallest is 32"),
    (("--arch", SMALL, "--weights", "absent.pth"), "no file absent.pth"),
    (("--arch", "vit_b_32", "--image-size", 50), "--image-size is 50x50; it must be a multiple of 32"),
    (("--arch", "vit_b_32", "--image-size", "32x64"), "--image-size is 32x64; images must be square"),
)


def test_wrong_input_is_said_in_one_line(monkeypatch) -> None:
    for arguments, expected in WRONG:
        with pytest.raises(UserError, match=re.escape(expected)):
            parity(monkeypatch, *arguments)


def test_stride_on_the_wrong_convolution_is_named() -> None:
    torch_model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)
    options = Options("resnet50", image_size=(32, 32))
    for block, expected in ((resnet.Bottleneck, None), (StrideOnTheFirst, "eval/activation/layer2.0.conv1")):
        model = resnet.ResNet((1, 1, 1, 1), block, num_classes=10)
        values = ours.variables(model, oracle.state(torch_model), options.arch)
        first = table.first_failure(compare.eval_rows(options, model, values, torch_model))
        assert (first.name if first else None) == expected
