"""Fine-tune: the loop and its command line.

python -m jaxsft.train --config configs/cifar10.py[:VARIANT] [--workdir DIR] [--config.KEY=VALUE ...]

The same command again resumes; a finished run says so. --workdir defaults to runs/<config file>[-<variant>].
Several machines, one process each: TPU pods and Slurm are recognised; elsewhere start the same command on each with
--coordinator HOST:PORT --num-processes N --process-id K (K from 0; HOST is the machine of process 0).
"""

from __future__ import annotations

from jaxsft import machine

if __name__ == "__main__":
    machine.ask_for_huge_pages()  # before the imports below: it starts this command anew

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxsft import checkpoint, cli, flags, processes
from jaxsft import config as config_module
from jaxsft import workdir as workdir_module
from jaxsft.checkpoint import Checkpoints
from jaxsft.interrupts import Interrupted, Interrupts
from jaxsft.job import Job, prepare
from jaxsft.log import Log, Meter, NotFinite, Speed, progress
from jaxsft.metrics import Evaluation
from jaxsft.runs import Best
from jaxsft.weights import cache_dir

IN_REPORT = 32  # images of the first batch


class Trainer:
    """The loop: updates, and between them lines of the log, evaluations, checkpoints, and an ear for signals."""

    def __init__(
        self, job: Job, start: int, meter: Meter, best: Best, checkpoints: Checkpoints, interrupts: Interrupts, log: Log
    ):
        self.job, self.start, self.meter, self.best = job, start, meter, best
        self.checkpoints, self.interrupts, self.log = checkpoints, interrupts, log
        self.speed = Speed()

    def run(self) -> Evaluation:
        """Train to the end; the last evaluation, whose line of the log is written when all else is on disk."""
        job, total, every = self.job, self.job.total_steps, self.job.config.checkpoint.every_steps
        batch_size = job.config.data.batch_size
        with progress(total * batch_size, self.start * batch_size, job.parallel.is_main) as bar:
            job.compile_evaluation()
            if 0 < self.start < total and job.is_evaluated(self.start) and not self.log.has_evaluation(self.start):
                self.evaluate(self.start)  # a signal came before its end
            for steps in job.calls(self.start):
                self.update(steps)
                bar.update(len(steps) * batch_size)
                step = steps[-1]
                if step < total and job.is_evaluated(step):
                    summary = self.evaluate(step).summary()
                    if job.parallel.is_main:
                        bar.write(f"epoch {job.epoch(step):g}: {summary}")
                if step % every == 0 or step in (total, self.best.step):
                    self.save(step)
            return self.finish(total)

    def update(self, steps: range) -> None:
        """The updates of one call, and the line of the log when it is time."""
        self.meter.add(steps, self.job.update(steps))
        self.speed.add(len(steps) * self.job.config.data.batch_size)
        step = steps[-1]
        if step == self.start + 1:
            self.interrupts.begin()
            self.meter.settle()
            self.speed.restart()  # what came so far was mostly compilation
        if step % self.job.config.train.log_every_steps == 0 or step == self.job.total_steps:
            self.write_train_line(step, self.meter.take(), self.speed.take())
        self.interrupts.poll(step)

    def evaluate(self, step: int) -> Evaluation:
        """Evaluate, write the line of the log, and note whether this is the best so far."""
        result = self.job.evaluate(between=lambda: self.interrupts.poll(step))
        self.log.write("eval", step, epoch=self.job.epoch(step), **result.scalars())
        self.best.offer(step, result.scalars())
        self.speed.restart()
        return result

    def finish(self, total: int) -> Evaluation:
        """The last evaluation, the last checkpoint, and only then the line that says that the run is finished."""
        result = self.job.evaluate(between=lambda: self.interrupts.poll(total))
        self.best.offer(total, result.scalars())
        self.save(total)
        self.checkpoints.wait()
        by_name = result.record(self.job.card.names)["per_class"]
        self.log.write("eval", total, epoch=self.job.epoch(total), **result.scalars(), per_class=by_name, final=True)
        self.log.sync()
        return result

    def save(self, step: int) -> None:
        """Start writing the checkpoint of `step`."""
        host = {"meter": self.meter.settle(), "config": self.job.config.to_dict()}
        self.log.sync()
        self.checkpoints.save(self.job.state, step, host, best=self.best.step)

    def write_train_line(self, step: int, sums: dict[str, Any], images_per_sec: float | None) -> None:
        """One line of the log about the steps since the last one."""
        self.log.write(
            "train",
            step,
            epoch=self.job.epoch(step),
            loss=sums["loss"] / sums["count"],
            accuracy=sums["top1"] / sums["count"],
            lr=float(self.job.rates[step - 1]),
            images_per_sec=images_per_sec,
        )


def fit(job: Job, workdir: Path) -> Evaluation:
    """Train from the newest intact checkpoint (or the start) to the end, and leave the files of a finished run.

    Raises:
      Preempted: a signal came; the state is saved.
      Stop: a loss that is not finite, a disk that is full.
    """
    config, is_main = job.config, job.parallel.is_main
    start, meter = resume(job, workdir)
    best = Best.of(workdir, config.checkpoint.best_metric, start)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.train.on_nan)
    with checkpoints, Log(workdir, start, is_main) as log, Interrupts(job.parallel) as interrupts:
        trainer = Trainer(job, start, meter, best, checkpoints, interrupts, log)
        try:
            with jax.transfer_guard("disallow"):
                return trainer.run()
        except Interrupted as interrupted:
            step = int(jax.device_get(job.state.step))
            trainer.save(step)
            checkpoints.wait()
            where = f"at step {step} of {job.total_steps}, saved in {checkpoints.path(step)}"
            raise cli.Preempted(interrupted.number, where, "the same command resumes") from None
        except NotFinite as found:
            checkpoints.wait()
            raise advise(found, checkpoints) from None
        except OSError as error:
            what = f"{workdir} can't be written: {error.strerror}"
            raise cli.Stop(what, "make room or mend the disk; the same command then resumes") from error
        finally:
            job.close()


def resume(job: Job, workdir: Path) -> tuple[int, Meter]:
    """Put the newest intact checkpoint into `job.state`; its step (0: none) and the sums of the metrics."""
    finite = job.config.train.on_nan == "stop"
    restored = checkpoint.newest(workdir, lambda record: job.state, set_aside=job.parallel.is_main)
    if restored is None:
        return 0, Meter(finite=finite)
    if job.parallel.process_count > 1:
        multihost_utils.assert_equal(restored.step, "the processes see different checkpoints: is --workdir shared?")
    job.state = job.parallel.replicate(restored.state)
    say(job, f"resuming at step {restored.step} of {job.total_steps}")
    return restored.step, Meter(restored.record["meter"], finite)


def say(job: Job, text: str) -> None:
    """Print a line, once a run: in the process that writes."""
    if job.parallel.is_main:
        print(text, flush=True)


def advise(found: NotFinite, checkpoints: Checkpoints) -> cli.Stop:
    """What to say of a number that is not finite."""
    # Those from which a finite loss has been computed since: the last one may hold what made this one infinite.
    good = [step for step in checkpoint.steps(checkpoints.workdir) if step < found.step - 1]
    where = f"the last good checkpoint is {checkpoints.path(good[-1])}" if good else "there is no good checkpoint yet"
    return cli.Stop(
        f"{found}; {where}",
        "try a smaller --config.optim.lr, --config.optim.warmup_epochs=1 or --config.optim.clip_norm=1 in another"
        " --workdir",
    )


def train(config: ConfigDict, workdir: Path) -> None:
    """Fine-tune as `config` says, in `workdir`, and print where the run lies and its accuracy.

    Raises:
      UserError: the config, the data, the weights or the directory do not allow it; found before anything is written.
    """
    began = time.perf_counter()
    finished = workdir_module.final_record(workdir)
    if finished:
        print(f"{workdir}: finished at step {finished['step']}, accuracy {finished['accuracy']:.4f}")
        return
    job, said = prepare(config)
    with workdir_module.lock(workdir, job.parallel.is_main):
        workdir_module.create(workdir, config, job.card, job.parallel.is_main)
        say(job, said)
        if job.parallel.is_main:
            job.bad_files.write_to(workdir)
        result = fit(job, workdir)
        if job.parallel.is_main:
            write_report(job, workdir, result)
    say(job, f"{workdir}: {result.summary()}, {time.perf_counter() - began:.0f} s")


def write_report(job: Job, workdir: Path, result: Evaluation) -> None:
    """Leave report.html in the run's directory."""
    from jaxsft import report  # here: a start need not wait for matplotlib
    from jaxsft.data import show

    images, labels = show.batch_of(job.config, job.train_source, job.card.preprocessing, IN_REPORT)
    report.write(workdir, job.card, result, show.grid(images, labels, job.train_source.class_names))


def keep_compilations() -> None:
    """Let JAX keep compiled programs in the user's cache, so that the same command starts faster the next time."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))


def main() -> None:
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises too, and that is ours to tell
    sys.unraisablehook = checkpoint.but_closed_loops(sys.unraisablehook)
    options = {"workdir": "where the run lies; default runs/<config file>[-<variant>]", **processes.OPTIONS}
    assert __doc__ is not None
    config, values, config_flag = flags.parse_flags(sys.argv[1:], __doc__, options)
    workdir = Path(values["workdir"] or Path("runs") / flags.run_name(config_flag))
    config_module.check(config)
    workdir_module.check(workdir, config)
    keep_compilations()
    with processes.join(values, config.parallel.timeout_seconds):
        train(config, workdir)


if __name__ == "__main__":
    cli.run(main)
