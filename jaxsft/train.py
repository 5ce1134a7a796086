"""Fine-tune: the loop and its command line.

python -m jaxsft.train --config configs/cifar10.py[:VARIANT] [--workdir DIR] [--config.KEY=VALUE ...]

The same command again resumes; a finished run says so. --workdir defaults to runs/<config file>[-<variant>].
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxsft import cli, optim
from jaxsft import config as config_module
from jaxsft import workdir as workdir_module
from jaxsft.checkpoint import Checkpoints
from jaxsft.data.order import Order
from jaxsft.data.sources import Source, open_source
from jaxsft.evaluate import evaluate, resident
from jaxsft.initial import initial
from jaxsft.log import Log, Meter, Speed, progress
from jaxsft.metrics import Evaluation
from jaxsft.parallel import DataParallel
from jaxsft.state import TrainState
from jaxsft.steps import Dataset, make_eval_step, make_train_step
from jaxsft.weights import ModelCard, cache_dir


@dataclasses.dataclass
class Job:
    """A run made ready: all that the loop needs, on the devices, before the first step."""

    config: ConfigDict
    card: ModelCard
    parallel: DataParallel
    order: Order
    total_steps: int
    rates: np.ndarray  # float32 [total_steps], the learning rate of each update
    state: TrainState
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    train_set: Dataset
    eval_set: Dataset

    def epoch(self, step: int) -> float:
        """How many epochs `step` updates are."""
        return step / self.order.steps_per_epoch

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation falls on `step`: the first step at or after each multiple of eval.every_epochs."""
        every = self.config.eval.every_epochs * self.order.steps_per_epoch
        return step == self.total_steps or step // every > (step - 1) // every

    def evaluate(self) -> Evaluation:
        """The current state on the whole eval split."""
        variables, batch_size = self.state.evaluated(), self.config.data.batch_size
        return evaluate(self.eval_step, variables, self.eval_set, batch_size, self.parallel)


def open_data(config: ConfigDict) -> tuple[Source, Source]:
    """The train and eval splits.

    Raises:
      UserError: they can't be had, or there are fewer training images than one batch takes.
    """
    data = config.data
    train_source = open_source(data.source, data.train_split, data.data_dir)
    eval_source = open_source(data.source, data.eval_split, data.data_dir)
    if len(train_source) < data.batch_size:
        raise cli.UserError(
            f"config.data.batch_size {data.batch_size} is more than the {len(train_source)} training images",
            f"take {len(train_source)} or less",
        )
    return train_source, eval_source


def prepare(config: ConfigDict) -> tuple[Job, str]:
    """Open the data, port the weights, build the steps; and a line that says what will be trained.

    Raises:
      UserError: the data, the weights or the config do not allow it.
    """
    parallel = DataParallel(config.parallel.backend)
    parallel.check_batch(config.data.batch_size, config.optim.accumulate)
    train_source, eval_source = open_data(config)
    order = Order(len(train_source), config.data.batch_size, config.seed)
    total_steps = config.train.steps or max(round(config.train.epochs * order.steps_per_epoch), 1)
    model, variables, card, said = initial(config, train_source.class_names, parallel.axis_name)
    rate = optim.schedule(config, order.steps_per_epoch, total_steps)
    optimizer = optim.make(config, variables["params"], rate)
    train_step = make_train_step(
        model,
        optimizer,
        card.preprocessing,
        augmentations=tuple(config.data.augment),
        seed=config.seed,
        smoothing=config.train.label_smoothing,
        accumulate=config.optim.accumulate,
        ema=config.train.ema,
        axis_name=parallel.axis_name,
    )
    eval_step = make_eval_step(model, card.preprocessing, axis_name=parallel.axis_name)
    job = Job(
        config=config,
        card=card,
        parallel=parallel,
        order=order,
        total_steps=total_steps,
        rates=np.asarray(rate(np.arange(total_steps, dtype=np.int32))),
        state=parallel.replicate(TrainState.create(variables, optimizer, with_average=config.train.ema > 0)),
        train_step=parallel.compile(train_step, donate_first=True),
        eval_step=parallel.compile(eval_step),
        train_set=resident(train_source, parallel),
        eval_set=resident(eval_source, parallel),
    )
    return job, f"{said}; {len(train_source)} training and {len(eval_source)} test images; {parallel}"


def fit(job: Job, workdir: Path) -> Evaluation:
    """Train from the newest checkpoint (or the start) to the end, evaluate, and leave the files of a finished run."""
    config, total = job.config, job.total_steps
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    start, meter = 0, Meter()
    newest = checkpoints.latest_step()
    if newest is not None:
        job.state, host = checkpoints.restore(newest, job.state)
        start, meter = newest, Meter(host["meter"])
        print(f"resuming at step {start} of {total}", flush=True)
    log, speed = Log(workdir, start), Speed()
    batch_size = config.data.batch_size
    with progress(total * batch_size, start * batch_size) as bar, jax.transfer_guard("disallow"):
        for step in range(start + 1, total + 1):
            batch = job.parallel.split({"example": job.order[step - 1]})
            job.state, counts = job.train_step(job.state, job.train_set, batch)
            meter.add(counts)
            bar.update(batch_size)
            speed.add(batch_size)
            if step == start + 1:
                meter.settle()
                speed.restart()  # what came so far was mostly compilation
            if step % config.train.log_every_steps == 0 or step == total:
                write_train_line(log, job, step, meter.take(), speed.take())
            if step == total:
                break
            if job.is_evaluated(step):
                result = job.evaluate()
                log.write("eval", step, epoch=job.epoch(step), **result.scalars())
                bar.write(f"epoch {job.epoch(step):g}: {result.summary()}")
                speed.restart()
            if step % config.checkpoint.every_steps == 0:
                checkpoints.save(job.state, step, {"meter": meter.settle()})
    result = job.evaluate()
    checkpoints.save(job.state, total, {"meter": meter.settle()})
    checkpoints.close()
    log.write("eval", total, epoch=job.epoch(total), **result.scalars(), final=True)
    log.close()
    return result


def write_train_line(log: Log, job: Job, step: int, sums: dict[str, Any], images_per_sec: float | None) -> None:
    """One line of the log about the steps since the last one."""
    log.write(
        "train",
        step,
        epoch=job.epoch(step),
        loss=sums["loss"] / sums["count"],
        accuracy=sums["top1"] / sums["count"],
        lr=float(job.rates[step - 1]),
        images_per_sec=images_per_sec,
    )


def train(config: ConfigDict, workdir: Path) -> None:
    """Fine-tune as `config` says, in `workdir`, and print where the run lies and its accuracy.

    Raises:
      UserError: the config, the data, the weights or the directory do not allow it; found before anything is written.
    """
    began = time.perf_counter()
    config_module.check(config)
    workdir_module.check(workdir, config)
    finished = workdir_module.final_record(workdir)
    if finished:
        print(f"{workdir}: finished at step {finished['step']}, accuracy {finished['accuracy']:.4f}")
        return
    job, said = prepare(config)
    workdir_module.create(workdir, config, job.card)
    print(said, flush=True)
    result = fit(job, workdir)
    print(f"{workdir}: {result.summary()}, {time.perf_counter() - began:.0f} s")


def keep_compilations() -> None:
    """Let JAX keep compiled programs in the user's cache, so that the same command starts faster the next time."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))


def main() -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax's notes are for developers
    options = {"workdir": "where the run lies; default runs/<config file>[-<variant>]"}
    assert __doc__ is not None
    config, values, config_flag = config_module.parse_flags(sys.argv[1:], __doc__, options)
    keep_compilations()
    train(config, Path(values["workdir"] or Path("runs") / config_module.run_name(config_flag)))


if __name__ == "__main__":
    cli.run(main)
