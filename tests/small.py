"""A run that is over in seconds, for the tests that kill, resume, damage and compare runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxsft.flags import parse_flags
from jaxsft.run import checkpoint

STEPS, EVERY = 16, 3
ARGUMENTS = (
    "--config=configs/cifar10.py:sample",
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


def config(*overrides: str) -> ConfigDict:
    """The config of the small run."""
    return parse_flags([*ARGUMENTS, *overrides], "", {})[0]


def outcome(workdir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a finished run computed: the checksum of every array of its last step, and its log without the times."""
    (last,) = checkpoint.steps(workdir)[-1:]
    path = workdir / checkpoint.FOLDER / str(last)
    arrays = checkpoint.read_record(path)["arrays"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return arrays, [{k: v for k, v in line.items() if k not in ("time", "images_per_sec")} for line in lines]
