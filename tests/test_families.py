"""A family that shares nothing with the others: no batch norm, no module of their names, another head and depth.

What the program knows of a family is its record; a name, a depth or a collection of another family that is written
into the program elsewhere fails here.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from convert import checkpoints, names
from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.learn import trainable
from jaxsft.models import families
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.models.family import Family, init_variables, variable_shapes
from jaxsft.models.layers import Linear, torch_linear_uniform
from jaxsft.models.stochastic import Keys
from jaxsft.models.weights import ModelCard
from jaxsft.run import checkpoint, saved
from tests.commands import run_command
from tests.files import write
from tests.small import outcome


class Scale(nn.Module):
    """A learnt factor of each channel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("layer_scale", nn.initializers.constant(0.7), (x.shape[-1],))


class Plain(nn.Module):
    """A biased convolution of 4x4 pixels, a factor, the mean over all pixels, a head called as VGG's: no batch norm."""

    num_classes: int = 1000
    head_init: str = "torch"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None
    frozen: tuple[str, ...] = ()
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        drawn = partial(torch_linear_uniform, fan_in=48)
        convolution = nn.Conv(8, (4, 4), 4, padding="VALID", kernel_init=drawn, bias_init=drawn, name="features.0")
        x = nn.relu(Scale(name="features.1")(convolution(x.astype(self.dtype))))
        return Linear(self.num_classes, self.head_init, param_dtype=self.param_dtype, name="classifier.1")(
            x.mean((1, 2))
        )


PLAIN = Family(
    {"plain": Plain}, "classifier.1", lambda path: {"features.0": 0, "features.1": 1}.get(path.split("/")[0], 2)
)


class TorchScale(torch.nn.Module):
    """torch's of `Scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scale = torch.nn.Parameter(torch.full((8,), 0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.layer_scale[:, None, None]


def in_torch(num_classes: int) -> torch.nn.Module:
    """torch's of `Plain`."""
    features = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), TorchScale(), torch.nn.ReLU())
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, num_classes))
    layers = (("features", features), ("pool", torch.nn.AdaptiveAvgPool2d(1)), ("classifier", head))
    return torch.nn.Sequential(OrderedDict(layers))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES])
    monkeypatch.setitem(ARCHITECTURES, "plain", Plain)  # so that it is taken away again
    families.register(PLAIN)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch's with a head of seven classes, behind the names that a trainer's wrapper adds."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "plain.safetensors"
    tensors = {f"model.{name}": value.numpy() for name, value in in_torch(7).state_dict().items()}
    safetensors.numpy.save_file(tensors, path)
    return path


def logits(variables: Any, images: np.ndarray, num_classes: int) -> np.ndarray:
    return np.asarray(Plain(num_classes).apply(variables, images, train=False))


def test_names_and_layouts(weights: Path) -> None:
    """Every tensor under torch's name, both ways, and the same logits."""
    found, card = checkpoints.read(str(weights), "plain")
    assert card.num_classes == 7
    shapes = variable_shapes(ARCHITECTURES["plain"](num_classes=7))
    assert "batch_stats" not in shapes
    variables = names.to_flax(found, shapes, "plain")
    for name, value in names.to_torch(variables, "plain").items():
        np.testing.assert_array_equal(value, found[name])
    model = in_torch(7)
    model.load_state_dict({name: torch.tensor(value) for name, value in found.items()})
    images = np.random.default_rng(0).standard_normal((3, 32, 32, 3), np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    # sums of 48 products in float32, in another order
    np.testing.assert_allclose(logits(variables, images, 7), expected, rtol=1e-5, atol=1e-6)


def test_a_wrong_file_is_told_by_its_own_names(weights: Path) -> None:
    found, _ = checkpoints.read(str(weights), "plain")
    found["classifier.0.weight"] = found.pop("classifier.1.weight")
    with pytest.raises(UserError, match=r"missing: classifier\.1\.weight; unused: classifier\.0\.weight$|missing: cla"):
        names.to_flax(found, variable_shapes(ARCHITECTURES["plain"](num_classes=7)), "plain")


def config_flags(workdir: Path, *more: str) -> str:
    few = "--config.data.train_split=train[:64] --config.data.eval_split=test[:40] --config.data.image_size=32"
    each = "--config.data.batch_size=16 --config.train.epochs=2 --config.optim.warmup_epochs=0 --config.optim.lr=0.05"
    return f"train --config configs/cifar10.py:sample --config.model.arch=plain --workdir {workdir} {few} {each} " + (
        " ".join(more)
    )


def test_a_run_from_weights_to_export(weights: Path, tmp_path: Path) -> None:
    """Port, new head, freezing, layer decay, moving average, checkpoints, resume, evaluate, back to torch."""
    assert run_command(f"convert to-flax {weights} --arch plain --out {tmp_path}/ported", tmp_path)[0] == 0
    more = (
        f"--config.model.weights={tmp_path}/ported",
        "--config.model.freeze=^features.0/bias",
        "--config.optim.layer_decay=0.5",
        "--config.train.ema=0.5",
        "--config.optim.weight_decay=0.1",
        "--config.optim.no_decay=layer_scale",
        "--config.checkpoint.every_steps=3",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for workdir in (whole, cut):
        status, said = run_command(config_flags(workdir, *more), tmp_path)
        assert status == 0, said
    # Resumed at step 3: the later checkpoints and the end of the log are taken away.
    for step in checkpoint.steps(cut)[1:]:
        (cut / "checkpoints" / str(step)).rename(tmp_path / f"later{step}")
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(line for line in lines if not json.loads(line).get("final")))
    assert run_command(config_flags(cut, *more), tmp_path)[0] == 0
    assert outcome(whole) == outcome(cut)

    run = saved.load_run(whole)
    assert run.card.num_classes == 10
    assert "batch_stats" not in run.variables or not run.variables["batch_stats"]
    before, _ = checkpoints.read(str(weights), "plain")
    np.testing.assert_array_equal(run.variables["params"]["features.0"]["bias"], before["features.0.bias"])
    assert np.any(run.variables["params"]["features.1"]["layer_scale"] != before["features.1.layer_scale"])

    status, said = run_command(f"evaluate --workdir {whole} --json {tmp_path}/e.json", tmp_path)
    assert status == 0, said
    assert json.loads((tmp_path / "e.json").read_text())["count"] == 40
    write(tmp_path / "a.png", size=(50, 40))
    assert run_command(f"predict --workdir {whole} {tmp_path}/a.png --json {tmp_path}/p.json", tmp_path)[0] == 0
    (answer,) = json.loads((tmp_path / "p.json").read_text())["images"]
    assert len(answer["classes"]) == 5
    command = f"export --workdir {whole} --format safetensors --out {tmp_path}/tuned.safetensors"
    assert run_command(command, tmp_path)[0] == 0
    model = in_torch(10)
    tuned = safetensors.numpy.load_file(tmp_path / "tuned.safetensors")
    model.load_state_dict({name: torch.tensor(value) for name, value in tuned.items()}, strict=True)


def test_a_head_that_is_not_there(tmp_path: Path) -> None:
    """The shapes of a body lack the head, and a fresh one is as wide as what comes before it."""
    from jaxsft.models import weights as ported
    from jaxsft.models.initial import initial

    card = ModelCard("plain", 0)
    assert set(ported.shapes(card)["params"]) == {"features.0", "features.1"}
    config = config_module.default()
    config.model.arch, config.model.weights = "plain", "body"
    body = init_variables(Plain(1), 3, 32)
    del body["params"]["classifier.1"]
    _, variables, _, said, _ = initial(config, ("a", "b", "c"), lambda *_: (body, card))
    assert variables["params"]["classifier.1"]["kernel"].shape == (8, 3)
    assert "which has no head, given one of 3" in said


def test_depth_and_kinds_are_the_familys() -> None:
    config = config_module.default()
    config.model.arch, config.optim.layer_decay = "plain", 0.5
    params = variable_shapes(Plain(3))["params"]
    paths = [f"{module}/{leaf}" for module, leaves in params.items() for leaf in leaves]
    rates = {path: trainable.lr_multiplier(config, path, paths) for path in paths}
    assert rates["features.0/kernel"] == 0.25
    assert rates["features.1/layer_scale"] == 0.5
    assert rates["classifier.1/bias"] == 1.0
    config.model.freeze = (".",)
    with pytest.raises(UserError, match="leave some to train, such as classifier.1"):
        trainable.rules(config, params)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
def test_shapes_are_of_jaxs_width_and_the_callers_own() -> None:
    """They are kept: what one caller changes, or asked without 64 bits, the next must not get."""
    model = Plain(3, param_dtype=jnp.float64)
    narrow = variable_shapes(model)["params"].pop("classifier.1")["bias"]
    with jax.enable_x64(True):
        wide = variable_shapes(model)["params"]["classifier.1"]["bias"]
    assert (narrow.dtype, wide.dtype) == (jnp.float32, jnp.float64)
    assert "classifier.1" in variable_shapes(model)["params"]


def test_the_one_registered_last_has_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Family({"plain": Plain}, "head", lambda path: 0)
    families.register(other)
    assert family_of("plain") is other
    assert family_of("resnet18").head == "fc"
