"""The loop of a run: updates, and between them the log, evaluations, checkpoints and signals; and how a run begins."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxsft import cli, storage
from jaxsft.interpret.multilabel import Result
from jaxsft.models.precision import continued
from jaxsft.progress import progress
from jaxsft.run import checkpoint, starts
from jaxsft.run import workdir as workdir_module
from jaxsft.run.best import Best
from jaxsft.run.checkpoint import Checkpoints, Unwritten
from jaxsft.run.interrupts import Interrupted, Interrupts
from jaxsft.run.job import Job
from jaxsft.run.log import Log, Meter, NotFinite, Throughput
from jaxsft.run.prepare import prepare
from jaxsft.run.profile import Profile
from jaxsft.run.working_copy import WorkingCopy
from jaxsft.storage import Location


class Trainer:
    """The loop: updates, and between them lines of the log, evaluations, checkpoints, and an ear for signals."""

    def __init__(
        self,
        job: Job,
        start: int,
        meter: Meter,
        best: Best,
        checkpoints: Checkpoints,
        interrupts: Interrupts,
        log: Log,
        profile: Profile,
    ):
        self.job, self.start, self.meter, self.best = job, start, meter, best
        self.checkpoints, self.interrupts, self.log, self.profile = checkpoints, interrupts, log, profile
        self.speed = Throughput()
        self.began = self.epoch_began = time.perf_counter()

    def run(self) -> Result:
        """Train to the end; the last evaluation, whose line of the log is written when all else is on disk."""
        job, total, every = self.job, self.job.total_steps, self.job.config.checkpoint.every_steps
        batch_size = job.config.data.batch_size
        images = {"total": total * batch_size, "initial": self.start * batch_size}
        with progress(enabled=job.parallel.is_main, unit="img", unit_scale=True, **images) as self.bar:
            self.tell("compiling ...")
            job.compile_ahead(self.start)
            if 0 < self.start < total and job.is_evaluated(self.start) and not self.log.has_evaluation(self.start):
                self.evaluate(self.start)  # a signal came before its end
            for steps in job.calls(self.start):
                with self.profile.call(steps):
                    self.update(steps)
                self.bar.set_postfix_str(f"epoch {job.epoch(steps[-1]):.2f}, loss {self.meter.loss:.4f}", refresh=False)
                self.bar.update(len(steps) * batch_size)
                step = steps[-1]
                is_evaluated = step < total and job.is_evaluated(step)
                result = self.evaluate(step) if is_evaluated else None
                if step < total and (result or int(job.epoch(step)) > int(job.epoch(steps[0] - 1))):
                    self.tell_epoch(step, result)
                if step % every == 0 or step == total or is_evaluated:
                    self.save(step)
            return self.finish(total)

    def update(self, steps: range) -> None:
        """The updates of one call, and the line of the log when it is time."""
        if self.job.is_unfrozen(steps[0] - 1):
            self.tell(f"epoch {self.job.epoch(steps[0] - 1):g}: more parameters train from here on, compiling ...")
        self.meter.add(steps, self.job.update(steps))
        self.speed.add(len(steps) * self.job.config.data.batch_size)
        step = steps[-1]
        if step == self.start + 1:
            self.interrupts.defer()
            self.meter.compute()
            self.tell(f"compiled in {time.perf_counter() - self.began:.0f} s")
            self.speed.reset()  # what came so far was mostly compilation
            self.epoch_began = time.perf_counter()
        elif self.job.is_unfrozen(steps[0] - 1):
            self.meter.compute()
            self.speed.reset()  # the step was compiled anew
        if step % self.job.config.train.log_every_steps == 0 or step == self.job.total_steps:
            self.write_train_line(step, self.meter.compute_and_reset(), self.speed.compute_and_reset())
        self.interrupts.poll()

    def tell(self, text: str) -> None:
        """Print a line above the bar, once a run."""
        if self.job.parallel.is_main:
            self.bar.write(cli.printable(text))
            sys.stdout.flush()

    def tell_epoch(self, step: int, result: Result | None) -> None:
        """The line of an epoch: what it has learnt, and how long it took with its evaluation."""
        sums, now = self.meter.reset_epoch(), time.perf_counter()
        epochs = f"{self.job.epoch(step):g} of {self.job.epoch(self.job.total_steps):g}"
        trained = f"training loss {sums['loss'] / sums['count']:.4f}" if sums["count"] else ""
        evaluated = f"evaluation {result.summary()}" if result else ""
        rate = f"lr {self.job.rates[step - 1]:.3g}"
        parts = (trained, evaluated, rate, f"{now - self.epoch_began:.0f} s")
        self.tell(f"epoch {epochs}: {', '.join(filter(None, parts))}")
        self.epoch_began = now

    def evaluate(self, step: int) -> Result:
        """Evaluate, write the line of the log, and note whether this is the best so far."""
        self.job.estimate_statistics(step, between=self.interrupts.poll)
        result = self.job.evaluate(between=self.interrupts.poll)
        self.log.write("eval", step, epoch=self.job.epoch(step), **result.scalars())
        self.best.update(step, result.scalars())
        self.speed.reset()
        return result

    def finish(self, total: int) -> Result:
        """The last evaluation, the last checkpoint, and only then the line that says that the run is finished."""
        self.job.estimate_statistics(total, between=self.interrupts.poll)
        result, without = self.job.evaluate(between=self.interrupts.poll), {}
        if self.job.state.average is not None:
            last = self.job.evaluate(between=self.interrupts.poll, averaged=False)
            self.tell(f"kept: the average, {result.summary()}; the last parameters, not kept: {last.summary()}")
            without = {f"last_{name}": value for name, value in last.scalars().items() if name != "count"}
        self.best.update(total, result.scalars())
        self.tell_epoch(total, result)
        self.save(total)
        self.checkpoints.wait()
        more = {**without, "per_class": result.record(self.job.card.names)["per_class"], "final": True}
        self.log.write("eval", total, epoch=self.job.epoch(total), **result.scalars(), **more)
        self.log.sync()
        return result

    def save(self, step: int) -> None:
        """Start writing the checkpoint of `step`."""
        card = dataclasses.asdict(self.job.card)
        host = {
            "meter": self.meter.compute(),
            "config": self.job.config.to_dict(),
            "card": card,
            "data": self.job.data,
            "precision": self.job.precision,
        }
        self.log.sync()
        self.checkpoints.save(self.job.state, step, host, best=self.best.step)

    def save_now(self) -> int:
        """Save the state as it is, to the disk itself; its step. At 0 there is nothing to save."""
        step = int(jax.device_get(self.job.state.step))
        if step:
            self.save(step)
            self.checkpoints.wait()
        return step

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
            **{name: sums[name] / sums["unlabelled"] for name in ("confident",) if "unlabelled" in sums},
            **{name: sums[name] for name in ("skipped",) if name in sums},
        )


def fit(job: Job, workdir: WorkingCopy, profile: int = 0, in_session: bool = False) -> Result:
    """Train from the newest intact checkpoint (or the start) to the end, and leave the files of a finished run.

    Args:
      job: to do.
      workdir: where its files go.
      profile: how many of its steps are traced.
      in_session: whether the process is a session of Python, which goes on afterwards (see `Interrupts`).

    Raises:
      Preempted: a signal came; the state is saved.
      Stop: a loss that is not finite, a disk that is full.
    """
    config, is_main = job.config, job.parallel.is_main
    start, meter = resume(job, workdir)
    if is_main:
        starts.note(workdir.path, start, job.parallel, job.precision)
    with Interrupts(job.parallel, in_session):  # features of many images take minutes, and leave nothing to save
        job.begin(job, start)
    best = Best.of(workdir.path, config.checkpoint.best_metric, start)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.train.on_nan, writes=is_main)
    traced = Profile(job, workdir, profile)  # is left last, after a signal once all is saved
    interrupts = Interrupts(job.parallel, in_session)
    with traced, checkpoints, Log(workdir.path, start, is_main) as log, interrupts:
        trainer = Trainer(job, start, meter, best, checkpoints, interrupts, log, traced)
        try:
            with jax.transfer_guard("disallow"):
                return trainer.run()
        except Interrupted as interrupted:
            step = trainer.save_now()
            seconds = f"{time.monotonic() - interrupted.noticed:.1f} s after the notice"
            where = f"at step {step} of {job.total_steps}, saved in {checkpoints.path(step)}, {seconds}"
            again = "the same call resumes" if in_session else "the same command resumes"
            raise cli.Preempted(interrupted.number, where, again) from None
        except NotFinite as found:
            checkpoints.wait()
            raise not_finite_error(found, checkpoints) from None
        except Unwritten:
            raise
        except cli.Stop:  # such as a picture that can't be read any more
            with contextlib.suppress(cli.Stop, NotFinite):  # what ended the run is told, whatever else there is
                if job.parallel.process_count == 1 and (step := trainer.save_now()):
                    cli.warn(f"the run ends at step {step} of {job.total_steps}, saved in {checkpoints.path(step)}")
            raise
        finally:
            job.close()


def resume(job: Job, workdir: WorkingCopy) -> tuple[int, Meter]:
    """Put the newest intact checkpoint into `job.state`; its step (0: none) and the sums of the metrics."""
    finite = job.config.train.on_nan == "stop"
    may_move = job.parallel.is_main
    restored = checkpoint.newest(workdir.path, lambda _: job.state, set_aside=may_move, place=workdir.place)
    step = restored.step if restored else 0
    require_agreement(job, step, "the processes see different checkpoints", "let all of them see one --workdir")
    if restored is None:
        return 0, Meter(finite=finite)
    job.state = job.parallel.replicate(restored.state)
    say(job, f"resuming at step {restored.step} of {job.total_steps}")
    before = restored.record.get("precision", job.precision)
    job.precision = continued(before, job.precision, step)
    if job.precision != before and job.parallel.is_main:
        cli.warn(f"{workdir.place} is computed in other numbers from step {step + 1} on: {job.precision}")
    return restored.step, Meter(restored.record["meter"], finite)


def require_agreement(job: Job, value: Any, what: str, what_to_do: str) -> None:
    """Raise a Stop in every process of a run where `value`, of JSON, is not the same in all of them."""
    if job.parallel.process_count == 1:
        return
    number = zlib.crc32(json.dumps(value).encode())
    try:
        multihost_utils.assert_equal(np.uint32(number), what)
    except AssertionError:
        raise cli.Stop(what, what_to_do) from None


def say(job: Job, text: str) -> None:
    """Print a line, once a run: in the process that writes."""
    if job.parallel.is_main:
        cli.say(text)


def not_finite_error(found: NotFinite, checkpoints: Checkpoints) -> cli.Stop:
    """What to say of a number that is not finite."""
    # Those from which a finite loss has been computed since: the last one may hold what made this one infinite.
    good = [step for step in checkpoint.steps(checkpoints.workdir.path) if step < found.step - 1]
    where = f"the last good checkpoint is {checkpoints.path(good[-1])}" if good else "there is no good checkpoint yet"
    return cli.Stop(
        f"{found}; {where}",
        "try a smaller --config.optim.lr, --config.optim.warmup_epochs=1 or --config.optim.clip_norm=1 in another"
        " --workdir",
    )


@contextlib.contextmanager
def silent_orbax() -> Iterator[None]:
    """For a while let Orbax log nothing: it logs what it raises, too, and that is ours to tell."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@silent_orbax()
def train(
    config: ConfigDict,
    workdir: Location,
    profile: int = 0,
    in_session: bool = False,
    ready: Callable[[ConfigDict], tuple[Job, str]] = prepare,
) -> None:
    """Fine-tune as `config` says, in `workdir`, and print where the run lies and its accuracy.

    `ready` makes the run ready, as `prepare` does by what the config says alone.

    Raises:
      UserError: the config, the data, the weights or the directory do not allow it; found before anything is written.
      Preempted, Stop: as `fit`, whose `profile` and `in_session` these are.
    """
    began = time.perf_counter()
    finished = workdir_module.final_record(workdir)
    if finished:
        cli.say(f"{workdir}: finished at step {finished['step']}, accuracy {finished['accuracy']:.4f}")
        return
    job, said = ready(config)
    require_agreement(job, job.data, "the processes see different data", "give all of them the same images")
    with workdir_module.opened(workdir, job.parallel.is_main) as copy:
        workdir_module.create(copy, config, job.card, job.data, job.parallel.is_main)
        say(job, said)
        if job.parallel.is_main:
            job.bad_files.write_to(copy.path)
        result = fit(job, copy, profile, in_session)
        if job.parallel.is_main:
            write_report(job, copy, result)
            write_card(job, copy)
    say(job, f"{workdir}: {result.summary()}, {time.perf_counter() - began:.0f} s")


def write_report(job: Job, workdir: WorkingCopy, result: Result) -> None:
    """Leave report.html in the run's directory. Without one the run is whole."""
    from jaxsft.interpret.report import single  # here: a start need not wait for it
    from jaxsft.run import reporting

    try:
        page = single.report(reporting.of_job(job, workdir, result))
        storage.write_file(workdir.path / reporting.REPORT, page)
    except Exception as error:
        reporting.warn_of(error, workdir.place)


def write_card(job: Job, workdir: WorkingCopy) -> None:
    """Leave MODEL_CARD.md in the run's directory. Without one the run is whole."""
    from jaxsft.run import model_card  # here: a start need not wait for what reads and writes YAML

    try:
        text = model_card.of_run(
            workdir.path,
            job.config,
            job.card,
            jax.device_get(job.state.evaluated()),
            job.total_steps,
            title=workdir.place.name,
            data=job.data,
            precision=job.precision,
            versions=checkpoint.versions(),
        )
        storage.write_file(workdir.path / model_card.FILE, text.encode(errors="replace"))
    except Exception as error:
        cli.warn(f"no {model_card.FILE} could be made: {type(error).__name__}: {error}")
