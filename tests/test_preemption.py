"""A run that is killed or told to stop, wherever it is, ends as if nothing had happened."""

from __future__ import annotations

import random
import re
import signal
from pathlib import Path

import pytest

from jaxsft.run import checkpoint
from tests import small

pytestmark = pytest.mark.full  # many processes, killed one after the other: minutes

# (moment, which of its kind, milliseconds into it), each soon enough after the last that the run is not over before.
KILLS = (
    ("step", 2, 5),
    ("checkpoint", 1, 1),
    ("evaluation", 1, 2),
    ("checkpoint", 1, 8),
    ("evaluation", 1, 0),
    ("step", 1, 1),
)
STOPS = (
    ("compilation", 1, 5, "SIGTERM"),
    ("step", 2, 0, "SIGTERM"),
    ("evaluation", 1, 1, "SIGTERM"),
    ("checkpoint", 1, 1, "SIGINT"),
    ("step", 2, 0, "SIGHUP"),  # the first is still counted as compilation
)


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """What the run computes when nothing disturbs it."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run("-m", "jaxsft.train", *small.ARGUMENTS, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    return small.outcome(workdir)


def disturb(run, workdir: Path, moment: str, count: int, milliseconds: float, name: str):
    command = ("-m", "tests.victim", moment, count, milliseconds, name)
    return run(*command, *small.ARGUMENTS, "--workdir", workdir)


def finish(run, workdir: Path):
    done = run("-m", "jaxsft.train", *small.ARGUMENTS, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    return small.outcome(workdir)


def test_a_run_killed_again_and_again_ends_bit_equal(run, undisturbed, tmp_path):
    statuses = [disturb(run, tmp_path, *kill, "SIGKILL").returncode for kill in KILLS]
    assert statuses == [-signal.SIGKILL] * len(KILLS)
    assert finish(run, tmp_path) == undisturbed


def test_a_signal_is_answered_with_a_checkpoint_of_the_step(run, undisturbed, tmp_path):
    at = 0
    for moment, count, milliseconds, name in STOPS:
        done = disturb(run, tmp_path, moment, count, milliseconds, name)
        assert done.returncode == 128 + signal.Signals[name], done.stderr
        said = done.stderr.splitlines()[-1]
        if moment == "compilation":
            assert said.startswith("stopped: SIGTERM before the first step; there was nothing to save")
            continue
        saved = rf"stopped: {name} at step (\d+) of 16, saved in (\S+), (\d+\.\d) s after the notice"
        match = re.fullmatch(f"{saved}; the same command resumes", said)
        assert match, done.stderr
        before, at = at, int(match[1])
        assert f"resuming at step {before} " in done.stdout or before == 0
        assert float(match[3]) < 30
        assert at > before  # no step made is lost
        assert checkpoint.steps(tmp_path)[-1] == at
        assert Path(match[2]) == tmp_path / "checkpoints" / str(at)
    assert finish(run, tmp_path) == undisturbed


def test_a_signal_while_features_are_computed_is_told(run, tmp_path):
    """They are a part of making the initial state: there is nothing to save yet."""
    sample = ("--config=configs/cifar10.py:sample", "--config.train.method=lp-ft", "--config.data.image_size=32")
    done = run("-m", "tests.victim", "features", 1, 0, "SIGTERM", *sample, "--workdir", tmp_path)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("stopped: SIGTERM before the first step; there was nothing to save")


def test_a_second_interrupt_leaves_at_once(run, tmp_path):
    """Also where Python's own handlers can't run: the main thread stays in one call of C for a minute."""
    script = (
        "import os, signal, threading, time, hashlib\n"
        "from jaxsft.run.interrupts import Interrupts\n"
        "from jaxsft.run.parallel import DataParallel\n"
        "with Interrupts(DataParallel()) as interrupts:\n"
        "    interrupts.defer()\n"
        "    for wait in (0.5, 1.0): threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 100_000_000)\n"  # releases the lock, as a compilation does
    )
    done = run("-c", script, timeout=30)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1].startswith("stopped: SIGINT again: left at once")


@pytest.mark.full
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("seed", range(20))
def test_twenty_runs_stopped_at_random_moments(run, undisturbed, tmp_path, name, seed):
    rng = random.Random(f"{name} {seed}")
    moment = rng.choice(("step", "evaluation", "checkpoint"))
    count = rng.randint(1, {"step": small.STEPS - 1, "evaluation": 3, "checkpoint": 5}[moment])
    done = disturb(run, tmp_path, moment, count, rng.uniform(0, 60), name)
    expected = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143}[name]
    # A late moment plus a long delay can come after the end: such a run was not disturbed.
    assert done.returncode in (expected, 0), done.stderr
    assert finish(run, tmp_path) == undisturbed
