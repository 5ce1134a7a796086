"""bfloat16 against float32: the same run in both, whose losses stay together."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxsft.flags import parse_flags
from jaxsft.run.job import Job
from jaxsft.run.prepare import prepare
from tests.conftest import ROOT


def run_in(precision: str, steps: int, file: str, *overrides: str) -> tuple[np.ndarray, Job]:
    """The loss of each update of the sample task, float64 [steps], and the run."""
    flags = [f"--config.train.precision={precision}"]
    config, _, _ = parse_flags(["--config", file, *flags, *(f"--config.{text}" for text in overrides)], "", {})
    job, _ = prepare(config)
    sums = [job.update(range(step, step + 1)) for step in range(1, steps + 1)]
    return np.array([float(s["loss"] / s["count"]) for s in jax.device_get(sums)]), job


def check(steps: int, window: int, file: str, *overrides: str) -> tuple[Job, Job]:
    full, full_job = run_in("float32", steps, file, *overrides)
    half, half_job = run_in("bfloat16", steps, file, *overrides)
    # bfloat16 keeps 8 bits: an activation is off by up to 4e-3 of itself, and the first loss, from equal weights, too.
    first = abs(half[0] / full[0] - 1)
    assert first <= 1e-2
    # Later the runs are two draws from one distribution: their loss curves agree when the noise of single batches
    # is averaged out over a window.
    smooth = [np.convolve(curve, np.ones(window) / window, "valid") for curve in (full, half)]
    apart = np.abs(smooth[1] / smooth[0] - 1)
    print(f"loss, relative: first step {first:.1e}, largest of a step {np.abs(half / full - 1).max():.1e},")
    print(f"mean over {window} steps: largest {apart.max():.1e}")
    assert apart.max() <= 0.05
    return full_job, half_job


def test_bfloat16_stays_with_float32() -> None:
    check(20, 10, f"{ROOT}/tests/small.py", "data.image_size=32", "train.steps=40", "eval.every_epochs=99.0")


@pytest.mark.full
def test_bfloat16_stays_with_float32_for_200_steps() -> None:
    jobs = check(200, 20, f"{ROOT}/configs/cifar10.py:sample", "train.steps=200")
    full, half = (job.evaluate().accuracy for job in jobs)
    print(f"accuracy {full:.4f}, {half:.4f}")
    # Four standard deviations of an accuracy over 1,000 images.
    assert abs(half - full) <= 4 * np.sqrt(full * (1 - full) / 1000)
