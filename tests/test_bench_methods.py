"""What methods are compared by: their recipes, and the loop of PyTorch's that stands beside ours."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from jaxsft import config as config_module
from jaxsft import recipes
from jaxsft.bench import methods, reference, torch_script
from jaxsft.cli import Stop
from jaxsft.data.augment import preprocess
from jaxsft.models.initial import preprocessing
from jaxsft.run.shared import Shared
from tests import small


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_has_a_recipe_that_goes_together(method: str) -> None:
    args = argparse.Namespace(weights="a.pth", data_dir="d", longer=2, overrides=["--config.optim.lr=0.02"])
    flags = methods.flags_of(args, method, 25, 1)
    config, _, _ = methods.parse_flags(flags, "", {})
    config_module.check(config)
    assert (config.seed, config.data.per_class, config.train.epochs, config.optim.lr) == (1, 25, 40, 0.02)
    assert bool(config.model.weights) == (method != "scratch")
    assert sum(config[section] != recipes.load("few_labels")[section] for section in ("optim", "model")) <= 2


def test_torch_sees_the_pictures_that_we_see() -> None:
    config = recipes.load("few_labels")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    found = torch_script.inputs(pictures, config.data, "cpu").numpy().transpose(0, 2, 3, 1)
    ours = preprocess(pictures.astype(np.float32), preprocessing(config))  # as after an augmentation
    np.testing.assert_allclose(found, ours, atol=1e-4)  # float32 over 0.2
    moved = torch_script.augmented(pictures, ("pad_crop", "flip"), np.random.default_rng(1))
    assert moved.shape == pictures.shape
    assert (moved != pictures).any((1, 2, 3)).all()
    assert torch_script.augmented(pictures, (), np.random.default_rng(1)) is pictures


@pytest.mark.parametrize("method", ["full", "probe"])
def test_the_loop_of_torch_trains(method: str, cifar7: Path) -> None:
    """A few updates from real weights: better than chance; of a probe only the head has moved."""
    config = recipes.load("few_labels")
    config.data.update({"source": "sample", "train_split": "train", "eval_split": "test[:100]", "image_size": 32})
    config.train.update({"steps": 8, "method": method})
    config.model.weights = str(cifar7)
    assert 0.2 < reference.accuracy(config) < 0.9


def test_a_loss_that_is_not_finite_is_one_line() -> None:
    config = small.config("--config.optim.lr=1e30", "--config.train.steps=3", "--config.optim.warmup_epochs=0")
    with pytest.raises(Stop, match="is (nan|inf) at step"):
        methods.ours(config, Shared())


def test_rows_are_means_and_ranges(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    """Over seeds; a run that is finished is not trained again, PyTorch's neither."""
    monkeypatch.setattr(methods, "ours", lambda config, shared: 0.6 + 0.01 * config.seed)
    monkeypatch.setattr(reference, "accuracy", lambda config: 0.5 + 0.1 * config.seed)
    args = argparse.Namespace(
        weights="a.pth", data_dir="", workdir=tmp_path, methods=["full", "sam"], per_class=[25], seeds=[0, 1, 2],
        longer=1, against=["torch"], overrides=[],
    )  # fmt: skip
    for _ in range(2):
        found = methods.run(args)
        for module, loop in ((reference, "accuracy"), (methods, "ours")):
            monkeypatch.setattr(module, loop, lambda *_, **__: pytest.fail("trained again"))
    assert found["methods"]["full"][25]["accuracy"] == pytest.approx([0.6, 0.61, 0.62])
    assert found["torch"] == {"full": {25: {**found["torch"]["full"][25], "mean": pytest.approx(0.6)}}}
    assert "sam" not in found["torch"]
    said = capsys.readouterr().out
    assert "61.0 (60.0-62.0)" in said
    assert "60.0 (50.0-70.0)" in said
    command = found["methods"]["sam"][25]["command"]
    assert command.startswith("python -m jaxsft.train --config=configs/few_labels.py:sam --config.model.weights=a.pth")
