"""A small network of every family learns from the embedded images, and goes on bit-equal after it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxsft.run import checkpoint
from tests.commands import run_command
from tests.narrow import NARROW
from tests.small import outcome

CHANCE = 0.1  # ten classes
# Layer norms and attention learn by AdamW, as all their authors train them. So does VGG, of whose 32 hidden values half
# would be dropped.
SGD = "--config.optim.lr=0.05"
ADAMW = "--config.optim.name=adamw --config.optim.lr=0.003"
LITTLE_DROPOUT = f"{ADAMW} --config.model.dropout=0.1"
OPTIMIZERS = {"narrow_vgg": LITTLE_DROPOUT, "narrow_vgg_bn": LITTLE_DROPOUT, "narrow_convnext": ADAMW,
              "narrow_vit": ADAMW, "narrow_swin": ADAMW, "narrow_swin_v2": ADAMW}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("arch", NARROW)
def test_it_learns_and_resumes(arch: str, tmp_path: Path) -> None:
    few = "--config.data.image_size=32 --config.data.batch_size=50 --config.train.epochs=12"
    each = f"{OPTIMIZERS.get(arch, SGD)} --config.model.weights= --config.checkpoint.every_steps=200"
    command = f"train --config configs/cifar10.py:sample --config.model.arch={arch} {few} {each} --workdir "
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for workdir in (whole, cut):
        status, said = run_command(command + str(workdir), tmp_path)
        assert status == 0, said
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = json.loads(lines[-1])
    assert last["final"]
    assert last["accuracy"] >= 3 * CHANCE
    # As one that was killed after an earlier checkpoint: what came later is taken away.
    for step in checkpoint.steps(cut)[1:]:
        (cut / "checkpoints" / str(step)).rename(tmp_path / f"later{step}")
    (cut / "metrics.jsonl").write_text("".join(line for line in lines if not json.loads(line).get("final")))
    assert run_command(command + str(cut), tmp_path)[0] == 0
    assert outcome(whole) == outcome(cut)
