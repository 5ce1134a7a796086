"""Two thousand steps with a checkpoint every fifty: neither memory nor open files grow."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from jaxsft import train
from jaxsft.train import Trainer
from tests import small

STEPS, EVERY = 2000, 50


def resident_mb() -> float:
    """Memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts by Linux's /proc")
def test_memory_and_open_files_stay_flat(tmp_path: Path, monkeypatch) -> None:
    seen: list[tuple[float, int]] = []
    original = Trainer.save

    def save(self: Trainer, step: int) -> None:
        original(self, step)
        self.checkpoints.wait()  # else files of a write that is going on are counted too
        gc.collect()
        seen.append((resident_mb(), open_files()))

    monkeypatch.setattr(Trainer, "save", save)
    overrides = (
        f"--config.train.epochs={STEPS / 4}",
        "--config.eval.every_epochs=100",
        f"--config.checkpoint.every_steps={EVERY}",
        "--config.train.log_every_steps=50",
        "--config.optim.lr=0.001",
    )
    train.train(small.config(*overrides), tmp_path)
    memory, files = zip(*seen[5:], strict=True)  # the first checkpoints fill caches and start threads
    assert len(memory) >= STEPS // EVERY - 5
    # A state is 2 MB and a batch's arrays are less: one of either kept a checkpoint would be 70 MB by the end.
    assert max(memory[-5:]) < max(memory[:5]) + 20, memory
    assert max(files[-5:]) <= max(files[:5]), files
