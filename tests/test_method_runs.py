"""Runs by several methods at once, killed and resumed; and options that can't be meant, before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.data.base import Arrays, Options
from jaxsft.data.sources import open_source
from jaxsft.learn.objective import Inputs
from jaxsft.models import weights
from jaxsft.run import log, prepare, saved
from jaxsft.run.teacher import load_teacher
from tests import small
from tests.test_faults import unfinish


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "run"
    small.run_here(path, "--config.train.steps=4", "--config.train.ema=0.5", "--config.train.ema_warmup=True")
    return path


def test_what_is_kept_of_an_average_is_said(teacher: Path) -> None:
    """Of the last evaluation both are in the log, and the checkpoint's is the average."""
    last = log.records(teacher)[-1]
    assert {"last_loss", "last_accuracy", "last_top5"} <= last.keys()
    assert last["last_loss"] != last["loss"]


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    """Forty pictures of several sizes in one folder, without folders of classes."""
    rng, folder = np.random.default_rng(0), tmp_path / "loose"
    folder.mkdir()
    for i in range(40):
        PIL.Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def test_a_folder_without_classes_is_unlabelled(loose: Path) -> None:
    assert len(open_source(f"folder:{loose}", "train", Options(labelled=False))) == 40
    with pytest.raises(UserError, match="holds no images"):
        open_source(f"folder:{loose}", "train", Options())


def test_a_resumed_run_by_every_method_is_the_same(teacher: Path, loose: Path, tmp_path: Path, monkeypatch) -> None:
    """SAM, SWA, a teacher, FixMatch on files that a worker reads, float16: in the middle of an epoch, bit for bit."""
    monkeypatch.setattr(Inputs, "strongly", lambda self: self)  # RandAugment takes its time to compile
    options = (
        f"--config.train.teacher={teacher}", f"--config.data.unlabelled=folder:{loose}", "--config.data.workers=1",
        "--config.data.unlabelled_ratio=1", "--config.train.fixmatch_threshold=0.11", "--config.optim.sam=0.05",
        "--config.train.swa_epochs=2", "--config.train.precision=float16", "--config.train.epochs=2.75",
        "--config.data.augment=()",
    )  # fmt: skip
    small.run_here(tmp_path / "whole", *options)
    resumed = shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    unfinish(resumed)
    shutil.rmtree(resumed / "checkpoints" / "11")
    small.run_here(resumed, *options)
    assert small.outcome(resumed) == small.outcome(tmp_path / "whole")
    arrays, lines = small.outcome(resumed)
    assert {"loss_scale/scale", "loss_scale/finite"} <= arrays.keys()
    assert all(0 < line["confident"] <= 1 and line["skipped"] >= 0 for line in lines if line["split"] == "train")
    shutil.rmtree(loose)
    with pytest.raises(UserError, match="is no folder"):
        small.run_here(tmp_path / "other", *options)


def test_unlabelled_images_come_in_an_order_of_their_own() -> None:
    config = config_module.default()
    config.data.update({"batch_size": 4, "unlabelled_ratio": 3, "unlabelled": "sample"})
    source = Arrays(np.zeros((30, 2, 2, 3), np.uint8), np.zeros(30, np.int32), ("a", "b"))
    order = prepare.unlabelled_order(config, source)
    assert order.steps_per_epoch == 2
    assert len(order[5]) == 12
    assert not np.array_equal(order[0], prepare.Order(30, 12, config.seed)[0])
    with pytest.raises(UserError, match="a batch takes 12 unlabelled images, and sample has 9; .*unlabelled_ratio=2"):
        prepare.unlabelled_order(config, source.select(np.arange(9)))
    config.data.unlabelled_split = "train[:7]"
    assert len(prepare.open_unlabelled(config)) == 7


def test_teachers_are_known_by_their_classes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its outputs in the order of the data's classes; without names their number must do."""
    config = config_module.default()
    assert load_teacher(config, ("a", "b")) == (None, None)
    config.train.teacher = str(tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        load_teacher(config, ("a", "b"))
    names: tuple[str, ...] | None = ("c", "a", "b")

    def load_run(workdir: Path) -> saved.Run:
        card = weights.ModelCard("resnet18", 3, names)
        return saved.Run(workdir, config, card, None, {"params": 1}, 7)

    monkeypatch.setattr("jaxsft.run.teacher.load_run", load_run)
    teacher, variables = load_teacher(config, ("a", "b", "c"))
    assert (teacher.columns, variables) == ((1, 2, 0), {"params": 1})
    for classes, message in ((("a", "d"), "does not know the class 'd'"), (("a", "b"), "'c', which the data lack")):
        with pytest.raises(UserError, match=message):
            load_teacher(config, classes)
    names = None
    assert load_teacher(config, ("x", "y", "z"))[0].columns == (0, 1, 2)
    with pytest.raises(UserError, match="has 3 outputs, not 2"):
        load_teacher(config, ("x", "y"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.ema": 0.9, "train.swa_epochs": 2}, "are two averages; set one"),
        ({"train.swa_epochs": 3, "train.epochs": 2.0}, "swa_epochs 3 is more than the 2 of"),
        ({"optim.sam": -0.1}, "config.optim.sam is -0.1; it must be 0 or more"),
        ({"train.precision": "fp16"}, "it must be 'float32', 'bfloat16', 'float16' or 'auto'"),
        ({"train.temperature": 0.0}, "config.train.temperature is 0.0; it must be above 0"),
    ],
)
def test_what_can_not_be_meant_is_one_line(settings: dict, message: str) -> None:
    config = config_module.default()
    for key, value in settings.items():
        config_module.put(config, key, value)
    with pytest.raises(UserError, match=message):
        config_module.check(config)
