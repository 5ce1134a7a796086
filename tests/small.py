"""A run that is over in seconds, for the tests that kill, resume, damage and compare runs; and its config file.

Half the time of such a test is compiling the step, so the network is a ResNet of one block.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from ml_collections import ConfigDict

from jaxsft import recipes
from jaxsft.flags import parse_flags
from jaxsft.models import families, resnet
from jaxsft.run import checkpoint

if TYPE_CHECKING:
    import torch

ARCH = "one_block"
FAMILY = dataclasses.replace(
    resnet.FAMILY, architectures={ARCH: partial(resnet.ResNet, (1,), resnet.BasicBlock, width=16)}
)
families.register(FAMILY)  # to whoever imports this file, or reads it as a config file
STEPS, EVERY = 16, 3
ARGUMENTS = (
    "--config=tests/small.py",
    "--config.data.train_split=train[:64]",
    "--config.data.eval_split=test[:40]",  # not a multiple of the batch: the last one is padded
    "--config.data.image_size=32",
    "--config.data.batch_size=16",
    f"--config.train.epochs={STEPS / 4}",
    "--config.eval.every_epochs=1",
    "--config.optim.lr=0.05",
    "--config.optim.warmup_epochs=0.5",
    "--config.train.log_every_steps=2",
    f"--config.checkpoint.every_steps={EVERY}",
)


def get_config() -> ConfigDict:
    """The recipe of the sample with this file's network, from scratch."""
    config = recipes.load("configs/cifar10.py:sample")
    config.model.update({"arch": ARCH, "weights": ""})
    return config


def in_torch(num_classes: int) -> torch.nn.Module:
    """torch's network of the same names and shapes: the sample's without its later stages."""
    from torch import nn  # here: a command that reads this file as its config does without torch

    from convert.make_sample import resnet10_w16

    model = resnet10_w16(num_classes)
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(16, num_classes)
    return model


def config(*overrides: str) -> ConfigDict:
    """The config of the small run."""
    return parse_flags([*ARGUMENTS, *overrides], "", {})[0]


def run_here(workdir: Path, *overrides: str) -> None:
    """The small run in this process."""
    train_here(config(*overrides), workdir)


def train_here(config: ConfigDict, workdir: Path) -> None:
    """What `train` does, but for the report: it has tests of its own, and takes as long as the updates."""
    from jaxsft.run import training  # here: this file is a config file too, which no command should wait for
    from jaxsft.run.workdir import check

    check(workdir, config)
    with mock.patch.object(training, "write_report"):
        training.train(config, workdir)


def knows_nothing(variables: Any, dataset: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A step of evaluation that computes nothing: all are taken for the first class."""
    rows = batch["mask"].astype(np.int32)
    return {"label": rows, "predicted": rows, "rank": rows, "loss": rows, "probability": rows, "mask": batch["mask"]}


def outcome(workdir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a finished run computed: the checksum of every array of its last step, and its log without the times."""
    (last,) = checkpoint.steps(workdir)[-1:]
    path = workdir / checkpoint.FOLDER / str(last)
    arrays = checkpoint.read_record(path)["arrays"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return arrays, [{k: v for k, v in line.items() if k not in ("time", "images_per_sec")} for line in lines]
