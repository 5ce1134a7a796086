"""A run made ready: its data, its state and its compiled steps, all that the loop of `train` needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxsft.data.base import Source
from jaxsft.data.loader import BadFiles, Loader
from jaxsft.data.order import Order
from jaxsft.interpret.multilabel import Result
from jaxsft.learn import trainable
from jaxsft.learn.average import swa_start
from jaxsft.learn.state import TrainState
from jaxsft.models.weights import ModelCard
from jaxsft.run.evaluation import evaluate
from jaxsft.run.parallel import BoundedDispatch, DataParallel
from jaxsft.run.program import Phase


@dataclasses.dataclass
class Job:
    """A run made ready: all that the loop needs, on the devices, before the first step."""

    config: ConfigDict
    card: ModelCard
    data: dict[str, Any]  # the fingerprint of both splits
    parallel: DataParallel
    train_source: Source
    eval_source: Source
    order: Order
    total_steps: int
    rates: np.ndarray  # float32 [total_steps], the learning rate of each update
    state: TrainState
    train_step: BoundedDispatch  # of the first phase, which is all there is without model.unfreeze
    several_steps: BoundedDispatch  # `train_step` for a list of batches in one call
    eval_step: BoundedDispatch
    statistics_step: Callable[..., Any] | None  # for an average whose batch statistics are estimated anew
    train_loader: Loader
    eval_loader: Loader
    bad_files: BadFiles
    precision: str  # what it is computed in, for people
    rules: trainable.Rules
    later: tuple[Phase, ...] = ()  # in their order
    begin: Callable[[Job, int], None] = lambda job, start: None  # before the first update after `start`: see `probe`

    def epoch(self, step: int) -> float:
        """How many epochs `step` updates are."""
        return step / self.order.steps_per_epoch

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation falls on `step`: the first step at or after each multiple of eval.every_epochs."""
        # As it is written: 0.1 of 11 steps, ten times, is 11, and in floating point a little more.
        every = Fraction(str(self.config.eval.every_epochs)) * self.order.steps_per_epoch
        return step == self.total_steps or step // every > (step - 1) // every

    def calls(self, start: int) -> Iterator[range]:
        """The updates after `start` that each call makes: train.steps_per_call of them where nothing falls between."""
        several, step = self.config.train.steps_per_call, start + 1
        if step <= self.total_steps:  # the first by itself: what follows is measured
            yield range(step, step + 1)
            step += 1
        while step <= self.total_steps:
            last = step + several - 1
            alone = last > self.total_steps or any(map(self.is_stop, range(step, last)))
            yield range(step, step + 1 if alone else last + 1)
            step += 1 if alone else several

    def is_stop(self, step: int) -> bool:
        """Whether the host has something to do after `step`."""
        every = self.config.train.log_every_steps, self.config.checkpoint.every_steps
        return any(step % n == 0 for n in every) or self.is_evaluated(step) or self.is_unfrozen(step)

    def is_unfrozen(self, step: int) -> bool:
        """Whether more parameters train from the update after `step` on."""
        return any(step == phase.after for phase in self.later)

    def update(self, steps: range) -> dict[str, jax.Array]:
        """Make these updates (from 1) and return the sums of each batch, scalars or [updates], still on their way."""
        batches = [self.train_loader.batch(step - 1) for step in steps]
        one, several = self.steps_after(steps[0] - 1)
        update, argument = (one, batches[0]) if len(batches) == 1 else (several, batches)
        self.state, counts = update(self.state, self.train_loader.dataset, argument)
        return counts

    def steps_after(self, step: int) -> tuple[BoundedDispatch, BoundedDispatch]:
        """The steps of the phase that the update after `step` is in: of one batch, and of several."""
        one, several = self.train_step, self.several_steps
        for phase in self.later:
            if phase.after <= step:
                one, several = phase.train_step, phase.several_steps
        return one, several

    def estimate_statistics(self, step: int, between: Callable[[], None] = lambda: None) -> None:
        """Where the average after `step` updates needs it, its batch statistics anew, over an epoch of training images.

        `between` is called after each batch and may raise; then nothing has changed.
        """
        every, epochs = self.order.steps_per_epoch, self.config.train.swa_epochs
        if self.statistics_step is None or step < swa_start(self.total_steps, every, epochs):
            return
        average = {**self.state.average, "seen": self.parallel.replicate(np.int32(0))}
        for number in range(step, step + every):
            average = self.statistics_step(average, self.train_loader.dataset, self.train_loader.batch(number))
            between()
        del average["seen"]
        self.state = self.state.replace(average=average)

    def evaluate(self, between: Callable[[], None] = lambda: None, averaged: bool = True) -> Result:
        """The current state on the whole eval split, its average where it has one and `averaged`.

        `between` is called after each batch and may raise.
        """
        variables = self.state.evaluated() if averaged else self.state.variables()
        return evaluate(self.eval_step, variables, self.eval_loader, self.card, between)

    def close(self) -> None:
        """End the loaders' worker processes."""
        self.train_loader.close()
        self.eval_loader.close()

    def compile_ahead(self, start: int) -> None:
        """Begin to compile what the updates after `start` and the evaluations need, all at once.

        Meanwhile the loaders' workers start, and at an evaluation, when there are updates to lose, nothing is compiled
        any more: a compilation does not hear a signal.
        """
        batch, dataset = self.train_loader.blank(), self.train_loader.dataset
        one, several = self.steps_after(start)
        one.compile_ahead(self.state, dataset, batch)
        if lengths := [len(steps) for steps in self.calls(start) if len(steps) > 1]:
            several.compile_ahead(self.state, dataset, [batch] * lengths[0])
        self.eval_step.compile_ahead(self.state.evaluated(), self.eval_loader.dataset, self.eval_loader.blank())
