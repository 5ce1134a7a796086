"""A whole run: the second start of a command against the first, and an epoch of training against its bare step."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from jaxsft import cli
from jaxsft import config as config_module
from jaxsft.bench.step import above_zero, whole
from jaxsft.flags import parse_flags
from jaxsft.run import log, training
from jaxsft.run.job import Job
from jaxsft.run.prepare import prepare
from jaxsft.run.working_copy import WorkingCopy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench run`."""
    parser.add_argument("--config", default="configs/cifar10.py:sample", help="FILE[:VARIANT]; default: %(default)s")
    parser.add_argument("--epochs", type=above_zero, default=3.0, help="to train for; default: %(default)s")
    parser.add_argument("--rounds", type=whole, default=3, help="of bare step and training; the median counts")
    parser.add_argument("overrides", nargs="*", help="after a --: --config.KEY=VALUE ... of jaxsft.train")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return it.

    Returns:
      "first_step_seconds" of the first and of the second start, with a cache that was empty before, and the "ratio";
      "epoch": images_per_sec of training (with its log, checkpoints and progress bar) and of the bare step, and the
      "ratio", each the median of `--rounds`.

    Raises:
      UserError: a config that can't be used.
    """
    flags = [f"--config={args.config}", *args.overrides]
    parse_flags(flags, "", {})
    with tempfile.TemporaryDirectory(prefix="jaxsft-bench-") as place:
        starts = [first_step_seconds(flags, Path(place), f"start{i}") for i in (1, 2)]
        ratio = starts[1] / starts[0]
        cli.say(f"seconds to the first finished step: {starts[0]:.1f}, again {starts[1]:.1f} (ratio {ratio:.2f})")
        turns = epochs_against_step(flags, args.epochs, args.rounds, Path(place))
    bare, epoch, of_both = (statistics.median(of_turns) for of_turns in zip(*turns))
    cli.say(f"images/s: bare step {bare:.1f}, training {epoch:.1f} (ratio {of_both:.3f})")
    return {
        "first_step_seconds": starts,
        "ratio": ratio,
        "epoch": {"images_per_sec": epoch, "bare_step": bare, "ratio": of_both},
    }


def first_step_seconds(flags: list[str], place: Path, name: str) -> float:
    """From the start of the command to the line of the log about its first step."""
    environment = {**os.environ, "JAXSFT_CACHE": str(place / "cache")}
    workdir = place / name
    one_step = ["--config.train.steps=1", "--config.optim.warmup_epochs=0", f"--workdir={workdir}"]
    command = [sys.executable, "-m", "jaxsft.train", *flags, *one_step]
    began = time.time()
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise cli.UserError(f"the run ended with {done.returncode}: {done.stderr.strip()[-300:]}", "mend the config")
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    return first["time"] - began


def epochs_against_step(flags: list[str], epochs: float, rounds: int, place: Path) -> list[tuple[float, float, float]]:
    """Of each round images a second of the bare step, before and after, of the same steps in training; their ratio."""
    every = [
        "--config.train.log_every_steps=10",
        f"--config.train.epochs={epochs}",
        f"--config.eval.every_epochs={epochs}",
    ]
    config, _, _ = parse_flags([*flags, *every], "", {})
    config_module.check(config)
    job, _ = prepare(config)
    initial = jax.device_get(job.state)
    count, turns = max(job.total_steps // 3, 1), []
    for turn in range(rounds):
        workdir = place / f"epoch{turn}"
        workdir.mkdir()
        before = bare_step(job, count)
        job.state = job.parallel.replicate(initial)
        training.fit(job, WorkingCopy(workdir))
        lines = [line["images_per_sec"] for line in log.records(workdir) if line["split"] == "train"]
        bare = statistics.median((*before, *bare_step(job, count)))
        trained = statistics.median([speed for speed in lines if speed])
        turns.append((bare, trained, trained / bare))
    return turns


def bare_step(job: Job, count: int) -> list[float]:
    """Images a second of three turns of the compiled step, over and over on one batch."""
    batch = job.train_loader.batch(0)
    speeds = []
    for turn in range(4):
        began = time.perf_counter()
        for _ in range(count if turn else 1):
            job.state, counts = job.train_step(job.state, job.train_loader.dataset, batch)
        jax.block_until_ready(counts)
        speeds.append(count * job.config.data.batch_size / (time.perf_counter() - began))
    return speeds[1:]
