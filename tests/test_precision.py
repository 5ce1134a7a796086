"""Which numbers a network is computed in: what 'auto' is where, what each product is told, and what people are told."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsft.interpret import metrics
from jaxsft.learn.objective import Inputs, Objective
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_train_step
from jaxsft.models import initial, resnet
from jaxsft.models.family import variable_shapes
from jaxsft.models.initial import make_model
from jaxsft.models.precision import continued, resolved_precision, said, with_products
from jaxsft.models.weights import ModelCard, Preprocessing
from jaxsft.run import checkpoint, log, prediction, training
from jaxsft.run.parallel import DataParallel
from jaxsft.run.prepare import prepare
from jaxsft.run.saved import Run
from jaxsft.run.working_copy import WorkingCopy
from tests import small
from tests.narrow import NARROW, SIDE
from tests.programs import compiled_into, precisions

CPU, TPU = SimpleNamespace(platform="cpu"), SimpleNamespace(platform="tpu")
T4, L4, B200, MI300, VEGA = (
    SimpleNamespace(platform="gpu", compute_capability=name) for name in ("7.5", "8.9", "10.0", "gfx942", "gfx906")
)
FULL, ONE_PASS = "products in full", "products in 1 bfloat16 pass (default)"

# train.precision, train.matmul_precision, devices -> what is computed, in words
SAID: tuple[tuple[str, str, list[Any], str], ...] = (
    ("auto", "default", [CPU] * 2, f"float32 (auto), {FULL}"),
    ("auto", "highest", [CPU], f"float32 (auto), {FULL}"),
    ("float32", "default", [CPU], f"float32, {FULL}"),
    ("bfloat16", "default", [CPU], f"bfloat16, float32 {FULL}"),
    ("auto", "default", [TPU] * 4, f"bfloat16 (auto), float32 {ONE_PASS}"),
    ("float32", "default", [TPU], f"float32, {ONE_PASS}"),
    ("float32", "high", [TPU], "float32, products in 3 bfloat16 passes (high)"),
    ("float32", "highest", [TPU], "float32, products in 6 bfloat16 passes (highest)"),
    ("auto", "default", [T4], f"float32 (auto), {FULL} (default)"),
    ("auto", "default", [L4], "bfloat16 (auto), float32 products in TF32 (default)"),
    ("auto", "default", [L4, T4], "float32 (auto), products in TF32 (default)"),
    ("auto", "highest", [B200], f"bfloat16 (auto), float32 {FULL} (highest)"),
    ("float32", "high", [B200], "float32, products in TF32 (high)"),
    ("auto", "default", [MI300], "bfloat16 (auto), float32 products in TF32 where the GPU has it (default)"),
    ("auto", "default", [VEGA], f"float32 (auto), {FULL} (default)"),
)


@pytest.mark.parametrize(("precision", "matmul_precision", "devices", "expected"), SAID)
def test_auto_is_bfloat16_where_devices_have_it(
    precision: str, matmul_precision: str, devices: list[Any], expected: str
) -> None:
    assert said(precision, matmul_precision, devices) == expected
    dtype = resolved_precision(precision, devices)
    assert dtype == expected.partition(" ")[0].rstrip(",")
    config = small.config(f"--config.train.precision={precision}")
    assert make_model(config, 3, devices=devices).dtype == jnp.dtype(dtype)


def test_what_jax_is_told_by_others_is_said_too() -> None:
    for own, expected in (
        ("float32", "6 bfloat16 passes (float32)"),
        ("tensorfloat32", "3 bfloat16 passes (tensorfloat32)"),
    ):
        with jax.default_matmul_precision(own):
            assert said("float32", "default", [TPU]) == f"float32, products in {expected}"
    with jax.default_matmul_precision("TF32_TF32_F32_X3"):
        assert said("float32", "default", [L4]) == "float32, products by TF32_TF32_F32_X3"
        assert said("float32", "highest", [L4]) == "float32, products in full (highest)"


NETWORKS = {name: partial(narrow.ours, dtype=jnp.float32) for name, narrow in NARROW.items()}
NETWORKS["bottlenecks"] = partial(resnet.ResNet, (1,), resnet.Bottleneck, width=16, dtype=jnp.bfloat16)
FAST = (("bottlenecks", "tpu"), ("narrow_swin", "tpu"), ("narrow_regnet_x", "cuda"))


@pytest.fixture(autouse=True)
def _zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed does not matter here, and to draw weights takes seconds."""
    monkeypatch.setattr(initial, "init_variables", lambda model, seed, size: zeros(model, size))


def zeros(model: Any, size: int) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variable_shapes(model, size))


def program(name: str, platform: str) -> str:
    """The train step of a network, as StableHLO for a platform that need not be there."""
    model = NETWORKS[name](num_classes=3)
    optimizer, small_images = optax.sgd(0.1), Preprocessing(SIDE, SIDE)
    create = partial(TrainState.create, optimizer=optimizer)
    state = jax.eval_shape(create, variable_shapes(model, SIDE))
    batch = {
        "image": jax.ShapeDtypeStruct((4, 40, 40, 3), jnp.uint8),  # to be resized
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
        "example": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    step = jax.jit(with_products(make_train_step(Objective(model, Inputs(small_images)), optimizer), "highest"))
    return step.trace(state, {}, batch).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("name", "platform"),
    [
        pytest.param(name, platform, marks=() if (name, platform) in FAST else pytest.mark.full)
        for platform in ("cpu", "cuda", "tpu")
        for name in NETWORKS
    ],
)
def test_every_product_is_as_the_config_says(name: str, platform: str) -> None:
    """Forward, backward, and where JAX is given a gradient of ours; of bfloat16 it is said too, and changes nothing."""
    assert precisions(program(name, platform)) == {"HIGHEST"}


def test_the_default_is_left_to_jax() -> None:
    assert with_products(zeros, "default") is zeros


def test_a_runs_steps_are_as_its_config_says() -> None:
    job, line = prepare(small.config("--config.train.matmul_precision=high"))
    assert line.endswith("; float32 (auto), products in full")
    batch, evaluated = job.train_loader.batch(0), next(iter(job.eval_loader.batches()))
    programs = (
        job.train_step.lower(job.state, job.train_loader.dataset, batch),
        job.eval_step.lower(job.state.evaluated(), job.eval_loader.dataset, evaluated),
    )
    for lowered in programs:  # resizing is in full whatever the config says
        assert "HIGH" in precisions(lowered.as_text()) <= {"HIGH", "HIGHEST"}
    square = DataParallel("shard_map", matmul_precision="high").compile(lambda state, data, batch: state @ state)
    assert precisions(square.lower(jnp.ones((2, 2)), {}, jnp.ones((1, 1))).as_text()) == {"HIGH"}


def test_predictions_are_as_the_config_says(tmp_path: Path) -> None:
    config = small.config("--config.train.matmul_precision=high")
    model, card = make_model(config, 2), ModelCard(small.ARCH, 2, preprocessing=Preprocessing(SIDE, SIDE))
    picture = Path(__file__).parents[1] / "jaxsft" / "data" / "sample" / "test.png"
    with compiled_into(tmp_path):
        run = Run(tmp_path, config, card, model, zeros(model, SIDE), 1)
        assert len(list(prediction.predict(run, [picture], 1))) == 1
    (written,) = tmp_path.glob("*_compile.mlir")
    assert "HIGH" in precisions(written.read_text()) <= {"HIGH", "HIGHEST"}


def test_a_run_that_goes_on_in_other_numbers_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As 'auto' makes of a run that moves between machines. The updates compute nothing here."""
    elsewhere, here = (
        "bfloat16 (auto), float32 products in 1 bfloat16 pass (default)",
        "float32 (auto), products in full",
    )
    warnings = []
    for steps, precision in ((3, elsewhere), (5, here), (7, here)):
        job, _ = prepare(small.config("--config.eval.every_epochs=99"))
        assert job.precision == here
        job.precision, job.total_steps = precision, steps
        counts = metrics.count(jnp.zeros((16, 10)), jnp.zeros(16, int), jnp.ones(16), jnp.ones(16, bool))
        kept = {key: counts[key] for key in log.ZERO}
        job.train_step = jax.jit(lambda state, *_, kept=kept: (state.replace(step=state.step + 1), kept))
        job.eval_step, job.compile_ahead = small.knows_nothing, lambda start: None
        training.fit(job, WorkingCopy(tmp_path))
        warnings.append(capsys.readouterr().err)
    after = f"{here}; up to step 3 {elsewhere}"
    assert warnings == ["", f"warning: {tmp_path} is computed in other numbers from step 4 on: {after}\n", ""]
    assert checkpoint.read_record(tmp_path / checkpoint.FOLDER / "7")["precision"] == after
    assert continued(after, elsewhere, 7) == f"{elsewhere}; up to step 7 {after}"
