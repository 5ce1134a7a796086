"""What a run computes: its compiled steps, of training in each of its phases, of evaluation, and of a head alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxsft.learn import trainable
from jaxsft.learn.average import average_of
from jaxsft.learn.distill import Teacher
from jaxsft.learn.losses import loss_of
from jaxsft.learn.objective import Objective
from jaxsft.learn.optim import make_optimizer
from jaxsft.learn.schedule import Schedule
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_eval_step, make_several, make_statistics_step, make_train_step
from jaxsft.models.precision import resolved_precision
from jaxsft.models.weights import Preprocessing
from jaxsft.run import numbers
from jaxsft.run.parallel import BoundedDispatch, DataParallel


class Phase(NamedTuple):
    """The steps from the time on when more parameters begin to train; compiled when they are first called."""

    after: int  # updates done by then
    train_step: BoundedDispatch
    several_steps: BoundedDispatch  # `train_step` for a list of batches in one call


def at_epoch(config: ConfigDict, model: nn.Module, rules: trainable.Rules, epoch: float) -> nn.Module:
    """`model` whose batch norms run on running statistics in all that is frozen at `epoch`."""
    if config.model.batch_norm == "frozen" or not config.model.unfreeze:
        return model
    return model.clone(frozen=trainable.frozen_modules(config, rules, epoch))


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """All that the steps of a run are made of."""

    config: ConfigDict
    model: nn.Module
    params: Any  # or their shapes
    rate: Schedule
    every: int  # updates of an epoch
    total: int  # updates
    parallel: DataParallel
    fresh: tuple[str, ...] = ()  # paths of the parameters that did not come from weights
    # What is left to be done on the device to the images of training, of evaluation and without labels; None: nothing.
    left: Preprocessing | None = None
    to_evaluate: Preprocessing | None = None
    of_unlabelled: Preprocessing | None = None
    class_weights: Sequence[float] | None = None  # as for `loss_of`
    teacher: Teacher | None = None

    @functools.cached_property
    def rules(self) -> dict[str, trainable.Rule]:
        """The rule of every parameter."""
        return trainable.rules(self.config, self.params, self.fresh)

    def network(self, epoch: float) -> nn.Module:
        """The model whose batch norms run on running statistics in all that is frozen at `epoch`."""
        return at_epoch(self.config, self.model, self.rules, epoch)

    def optimizer(self, epoch: float = 0.0) -> optax.GradientTransformationExtraArgs:
        """Of what trains at `epoch`; its state has one structure at every epoch."""
        return make_optimizer(self.config, self.params, self.rate, self.fresh, epoch)

    def objective(self, epoch: float = 0.0) -> Objective:
        """What is minimised at `epoch`."""
        train = self.config.train
        loss = loss_of(self.config, self.parallel.axis_name, self.class_weights)
        teacher = self.teacher and dataclasses.replace(
            self.teacher, weight=train.distill_weight, temperature=train.temperature
        )
        return Objective.of(self.config, self.network(epoch), self.left, loss, teacher, self.of_unlabelled)

    def update(self, epoch: float, ends: tuple[Any, Any]) -> Callable[..., Any]:
        """The update at `epoch`, of one device; `ends` as for `average_of`."""
        return make_train_step(
            self.objective(epoch),
            self.optimizer(epoch),
            seed=self.config.seed,
            accumulate=self.config.optim.accumulate,
            sam=self.config.optim.sam,
            frozen=trainable.waiting(self.rules, epoch),
            average=average_of(self.config, *ends),
            axis_name=self.parallel.axis_name,
        )

    def taking_numbers(self, make: Callable[[Program, tuple[Any, Any]], Callable[..., Any]]) -> Callable[..., Any]:
        """The step that `make` makes of a program and its ends, with the numbers that come with the data set."""

        def step(state: Any, dataset: dict[str, Any], batch: Any) -> Any:
            rest = dict(dataset)
            own = numbers.taken(self.config, rest.pop(numbers.KEY))
            return make(dataclasses.replace(self, config=own.config, rate=own.rate), own.ends)(state, rest, batch)

        return step

    def body(self, epoch: float = 0.0) -> Callable[..., Any]:
        """The update at `epoch`, of one device: (state, what `dataset` returns, batch) -> (state, counts)."""
        return self.taking_numbers(lambda program, ends: program.update(epoch, ends))

    def phases(self) -> list[Phase]:
        """The steps of training, in their order; without model.unfreeze there is one phase.

        Raises:
          UserError: a parameter would begin to train after the end of the run.
        """
        found = []
        for after, epoch in trainable.phases(self.rules, self.every, self.total):
            body = self.body(epoch)
            steps = (self.parallel.compile(step, donate_first=True) for step in (body, make_several(body)))
            found.append(Phase(after, *steps))
        return found

    def evaluation(self) -> BoundedDispatch:
        """The step of evaluation."""
        return self.parallel.compile(make_eval_step(self.model, self.to_evaluate), rows=True)

    def statistics(self) -> Callable[..., Any] | None:
        """The step by which an average's batch statistics are estimated anew; None: it keeps those that it has."""
        if not self.config.train.swa_epochs:
            return None
        last = trainable.phases(self.rules, self.every, self.total)[-1][1]

        def make(program: Program, _: Any) -> Callable[..., Any]:
            objective, seed = program.objective(last), program.config.seed
            return make_statistics_step(objective.model, objective.inputs, seed=seed, axis_name=self.parallel.axis_name)

        return self.parallel.compile(self.taking_numbers(make))

    def arguments(self) -> dict[str, dict[str, np.ndarray]]:
        """What the steps of training are called with beside images, on the host."""
        rates = np.asarray(self.rate(np.arange(self.total, dtype=np.int32)))
        return {numbers.KEY: numbers.numbers_of(self.config, rates, self.every)}

    def dataset(self, dataset: dict[str, Any]) -> dict[str, Any]:
        """What the steps of training are called with beside a batch, of the set that the loader has on the devices."""
        return {**dataset, **self.parallel.replicate(self.arguments())}

    def state(self, variables: Any) -> TrainState:
        """The state before the first update, on every device."""
        with_average = bool(self.config.train.ema or self.config.train.swa_epochs)
        precision = resolved_precision(self.config.train.precision, self.parallel.devices)
        state = TrainState.create(variables, self.optimizer(), with_average, precision == "float16")
        return self.parallel.replicate(state)

    def of_head(self, head: nn.Module) -> Program:
        """The same for the output layer alone, on features: as the state is the whole network's, the body stays."""
        return dataclasses.replace(self, model=head, left=None, to_evaluate=None, of_unlabelled=None, teacher=None)
