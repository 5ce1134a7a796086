"""The whole job against PyTorch's script: the same recipe on both sides, and what is told of them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jaxsft.bench import job, reference, torch_script
from jaxsft.flags import parse_flags
from jaxsft.learn.optim import make_optimizer

SMALL = (
    "--config=configs/cifar10.py:sample", "--config.model.arch=resnet18", "--config.model.weights=",
    "--config.data.train_split=train[:40]", "--config.data.eval_split=test[:20]", "--config.data.image_size=32",
    "--config.data.batch_size=16", "--config.train.epochs=1.5", "--config.optim.warmup_epochs=0",
)  # fmt: skip


def test_what_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Stages are times between marks; ratios say how many times as fast ours is."""
    turns = {
        kind: [job.of_marks([0, 1, 2, end - 2, end - 1, end], accuracy) for end, accuracy in ends]
        for kind, ends in {
            "cold": [(30, 0.5), (20, 0.7), (25, 0.6)],
            "again": [(10, 0.5)],
            "another rate": [(11, 0.4)],
            "torch": [(20, 0.55)],
        }.items()
    }
    record = job.told(argparse.Namespace(work="cifar"), {kind: job.summary(of) for kind, of in turns.items()})
    assert (record["cold"]["seconds"], record["cold"]["accuracy"]) == (25, 0.6)
    assert record["cold"]["stages"] == {"start-up": 1, "first step": 1, "epochs": 21, "evaluation": 1, "rest": 1}
    assert record["ratio"] == {"cold": 20 / 25, "again": 2.0}
    assert record["another_rate_ratio"] == 1.1
    assert "PyTorch's time by ours: cold 0.80, again 2.00" in capsys.readouterr().out


@pytest.mark.parametrize("work", job.WORKS)
def test_the_recipes_go_together(work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's script gets what the command gets: rates, decay, smoothing, sizes."""
    sets = {"train": np.zeros((250, 2, 2, 3), np.uint8), "test": np.zeros((50, 2, 2, 3), np.uint8)}

    class Images:
        def __init__(self, images: np.ndarray):
            self.images, self.labels = images, np.arange(len(images)) % 10

        def __len__(self) -> int:
            return len(self.images)

    monkeypatch.setattr(job, "open_splits", lambda config: tuple(map(Images, sets.values())))
    more = ["--config.data.source=folder:/a/b"] if work == "photos" else []
    config, _, _ = parse_flags([*job.WORKS[work], "--config.model.weights=w.pth", *more], "", {})
    recipe = json.loads(job.write_recipe(config, tmp_path).read_text())
    assert len(recipe["rates"]) == round(config.train.epochs * (250 // config.data.batch_size))
    assert max(recipe["rates"]) == pytest.approx(config.optim.lr, rel=0.2)
    assert recipe["settings"] == reference.settings_of(config)
    assert (recipe["arch"], recipe["weights"]) == ("resnet18", "w.pth")
    assert (recipe["data"]["image_size"], recipe["data"]["batch_size"]) == (
        config.data.image_size,
        config.data.batch_size,
    )
    assert recipe["data"]["folder"] == ("/a/b" if work == "photos" else "")
    assert recipe["smoothing"] == config.train.label_smoothing


def test_the_script_updates_as_we_do() -> None:
    """SGD by the settings of a config, at its rates: torch's arithmetic on a single weight is ours."""
    config, _, _ = parse_flags([*SMALL, "--config.optim.weight_decay=0.01", "--config.optim.nesterov=True"], "", {})
    model = torch.nn.Linear(1, 2, bias=False).double()
    start = model.weight.detach().numpy().T.copy()
    random, rates = np.random.default_rng(0), reference.rates_of(config, 40)
    batches = [(torch.tensor(random.normal(size=(4, 1))), torch.tensor([0, 1, 1, 0])) for _ in rates]
    done: list[int] = []
    torch_script.train(model, batches, rates, reference.settings_of(config), after=done.append)
    assert done == list(range(len(rates)))
    params: Any = {"fc": {"kernel": start}}
    optimizer = make_optimizer(config, params, lambda t: rates[t])
    state = optimizer.init(params)
    for step, (x, labels) in enumerate(batches):
        logits = x.numpy() @ params["fc"]["kernel"]
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        grads = {"fc": {"kernel": x.numpy().T @ (p - np.eye(2)[labels.numpy()]) / 4}}
        updates, state = optimizer.update(grads, state, params, step=step)
        params = {"fc": {"kernel": params["fc"]["kernel"] + np.asarray(updates["fc"]["kernel"])}}
    np.testing.assert_allclose(model.weight.detach().numpy().T, params["fc"]["kernel"], rtol=1e-6)


@pytest.mark.full
def test_the_whole_measurement(tmp_path: Path) -> None:
    """As a user would, on a few images; the photographs' script is run on a folder of two."""
    args = argparse.Namespace(work="cifar", weights="", data_dir="", against="torch", rounds=1, overrides=SMALL)
    record = job.run(args)
    assert {*record} == {"cold", "again", "another rate", "torch", "ratio", "another_rate_ratio"}
    for kind in ("cold", "again", "another rate", "torch"):
        assert sum(record[kind]["stages"].values()) == pytest.approx(record[kind]["seconds"])
        assert min(record[kind]["stages"].values()) >= 0
        assert 0 <= record[kind]["accuracy"] <= 1
    assert record["cold"]["stages"]["first step"] > record["again"]["stages"]["first step"]


@pytest.mark.full
def test_photographs_lie_as_both_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "PHOTOS", 40)
    job.write_photos(tmp_path / "photos")
    counts = {split: len(list((tmp_path / "photos" / split).glob("*/*.jpg"))) for split in ("train", "val")}
    assert counts == {"train": 36, "val": 4}
    flags = [*job.WORKS["photos"], "--config.model.weights=", "--config.data.image_size=64",
             f"--config.data.source=folder:{tmp_path / 'photos'}", "--config.data.batch_size=16"]  # fmt: skip
    recipe = job.write_recipe(parse_flags(flags, "", {})[0], tmp_path)
    found = job.torchs(recipe)
    assert found["seconds"] > 0
    assert subprocess.run([sys.executable, str(job.SCRIPT), str(tmp_path / "none.json")], check=False).returncode
