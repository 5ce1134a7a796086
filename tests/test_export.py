"""A fine-tuned run handed on: torchvision loads it strictly and gives the same logits, and so does StableHLO."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jaxsft.data.augment import preprocess
from jaxsft.parity import oracle
from jaxsft.run.saved import load_run
from tests import small
from tests.commands import run_command
from tests.programs import precisions


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, its products in full on any machine."""
    path = tmp_path_factory.mktemp("export") / "run"
    small.run_here(path, "--config.train.steps=3", "--config.train.matmul_precision=highest")
    return path


def export(workdir: Path, form: str, out: Path) -> None:
    status, said = run_command(f"export --workdir {workdir} --format {form} --out {out}", out.parent)
    assert status == 0, said


def test_torchvision_takes_it_strictly_and_gives_the_same_logits(workdir: Path, tmp_path: Path) -> None:
    tuned = load_run(workdir)
    images = np.random.default_rng(0).standard_normal((8, 32, 32, 3), np.float32)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(partial(tuned.model.apply, train=False))(tuned.variables, images))
    for form, suffix, read in (("torch", ".pth", torch.load), ("safetensors", ".safetensors", load_file)):
        path = tmp_path / f"tuned{suffix}"
        export(workdir, form, path)
        model = small.in_torch(num_classes=10)
        model.load_state_dict(read(path), strict=True)
        with torch.no_grad():
            theirs = model.eval()(oracle.nchw(images)).numpy()
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()  # summation order, as in parity
        assert int(model.bn1.num_batches_tracked) == 3


def test_stablehlo_gives_the_same_logits(workdir: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned.stablehlo"
    export(workdir, "stablehlo", path)
    tuned = load_run(workdir)
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert precisions(exported.mlir_module()) == {"HIGHEST"}
    logits = jax.jit(lambda x: tuned.model.apply(tuned.variables, preprocess(x, tuned.card.preprocessing), train=False))
    for count in (1, 5):
        images = np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        expected = logits(images)
        found = exported.call(images)
        assert found.shape == (count, 10)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


WRONG = (
    ("onnx", "x.onnx", "known: torch, safetensors, stablehlo"),
    ("torch", "x.safetensors", "let it end in .pth"),
    ("safetensors", "there.safetensors", "exists"),
)


def test_wrong_input_is_said_in_one_line(workdir: Path, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"")
    for form, name, expected in WRONG:
        status, said = run_command(f"export --workdir {workdir} --format {form} --out {tmp_path / name}", tmp_path)
        assert status == 2, name
        assert said.startswith("error: "), said
        assert expected in said
        assert len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]
