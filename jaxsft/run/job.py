"""A run made ready: its data, its state and its compiled steps, all that the loop of `train` needs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft.data.base import Source
from jaxsft.data.fingerprint import fingerprint
from jaxsft.data.loader import BadFiles, Loader, WithUnlabelled, make_loader
from jaxsft.data.order import Order
from jaxsft.data.reading import EvalPlan, TrainPlan
from jaxsft.data.sources import open_splits, open_unlabelled
from jaxsft.interpret.multilabel import Result
from jaxsft.learn import trainable
from jaxsft.learn.average import Move, average_of, swa_start
from jaxsft.learn.losses import loss_of, numeric_weights
from jaxsft.learn.objective import Objective
from jaxsft.learn.optim import make_optimizer
from jaxsft.learn.schedule import make_schedule, scaling_said
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_eval_step, make_several, make_statistics_step, make_train_step
from jaxsft.models.family import variable_shapes
from jaxsft.models.initial import checked_shapes, initial, make_model
from jaxsft.models.layers import OneValueError
from jaxsft.models.precision import resolved_precision
from jaxsft.models.precision import said as precision_said
from jaxsft.models.weights import ModelCard
from jaxsft.run import labelling
from jaxsft.run.evaluation import evaluate, of_split
from jaxsft.run.parallel import DataParallel, all_devices
from jaxsft.run.pretrained import load_pretrained
from jaxsft.run.teacher import load_teacher

UNLABELLED = 2**62  # added to the seed, so that both streams are in orders of their own


class Phase(NamedTuple):
    """What takes the place of the steps before when more parameters begin to train; compiled when first called."""

    after: int  # updates done by then
    train_step: Callable[..., Any]
    several_steps: Callable[..., Any]


@dataclasses.dataclass
class Job:
    """A run made ready: all that the loop needs, on the devices, before the first step."""

    config: ConfigDict
    card: ModelCard
    data: dict[str, Any]  # the fingerprint of both splits
    parallel: DataParallel
    train_source: Source
    order: Order
    total_steps: int
    rates: np.ndarray  # float32 [total_steps], the learning rate of each update
    state: TrainState
    train_step: Callable[..., Any]  # of the first phase, which is all there is without model.unfreeze
    several_steps: Callable[..., Any]  # `train_step` for a list of batches in one call
    eval_step: Callable[..., Any]
    statistics_step: Callable[..., Any] | None  # for an average whose batch statistics are estimated anew
    train_loader: Loader
    eval_loader: Loader
    bad_files: BadFiles
    precision: str  # what it is computed in, for people
    rules: trainable.Rules
    later: tuple[Phase, ...] = ()  # in their order

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
        one, several = self.train_step, self.several_steps
        for phase in self.later:
            if phase.after < steps[0]:
                one, several = phase.train_step, phase.several_steps
        update, argument = (one, batches[0]) if len(batches) == 1 else (several, batches)
        self.state, counts = update(self.state, self.train_loader.dataset, argument)
        return counts

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
        return evaluate(self.eval_step, variables, self.eval_loader, between, multi_label=self.card.multi_label)

    def close(self) -> None:
        """End the loaders' worker processes."""
        self.train_loader.close()
        self.eval_loader.close()

    def compile_evaluation(self) -> None:
        """Compile the evaluation by its first batch, at a time when a signal may end the process in the middle of it.

        Later there are updates to lose, and a compilation does not listen.
        """
        with contextlib.suppress(FirstBatchDone):
            self.evaluate(stop_after_first_batch)


class FirstBatchDone(Exception):
    """The first batch of an evaluation is done."""


def stop_after_first_batch() -> None:
    """End an evaluation after its first batch."""
    raise FirstBatchDone


def open_data(config: ConfigDict) -> tuple[Source, Source]:
    """The train and eval splits.

    Raises:
      UserError: they can't be had, there are fewer training images than one batch takes, or a single class, or images
        have several labels and the config is for one, or the other way round.
    """
    train_source, eval_source = open_splits(config)
    labelling.check(config, train_source)
    if len(train_source.class_names) == 1:
        raise cli.UserError(
            f"{config.data.source} has a single class, {train_source.class_names[0]!r}: nothing to tell apart",
            "name the folder that holds the classes, or data of two classes and more",
        )
    if len(train_source) < config.data.batch_size:
        raise cli.UserError(
            f"config.data.batch_size {config.data.batch_size} is more than the {len(train_source)} training images",
            f"take {len(train_source)} or less",
        )
    return train_source, eval_source


def order_of(config: ConfigDict, source: Source, parallel: DataParallel) -> Order:
    """Which training images make up each step.

    Raises:
      UserError: the last batch is kept and does not split evenly over the devices.
    """
    data = config.data
    keep_last = data.last_batch == "keep"
    if keep_last and len(source) % data.batch_size:
        parallel.check_batch(len(source) % data.batch_size, config.optim.accumulate, "the last batch of an epoch,")
    labels = source.labels if data.sampling == "balanced" else None
    return Order(len(source), data.batch_size, config.seed, keep_last, labels)


def unlabelled_order(config: ConfigDict, source: Source) -> Order:
    """Which unlabelled images make up each step: data.unlabelled_ratio for each labelled one, by a seed of their own.

    Raises:
      UserError: there are fewer than one batch takes.
    """
    data, count = config.data, config.data.batch_size * config.data.unlabelled_ratio
    if len(source) < count:
        raise cli.UserError(
            f"a batch takes {count} unlabelled images, and {data.unlabelled} has {len(source)}",
            f"set --config.data.unlabelled_ratio={max(len(source) // data.batch_size, 1)} or a smaller data.batch_size",
        )
    return Order(len(source), count, (config.seed + UNLABELLED) % 2**63)


def check_batch_norm(config: ConfigDict, parallel: DataParallel, order: Order, rules: trainable.Rules) -> None:
    """Find out whether batch norm has more than one value a channel to train on, in the last batch too.

    At the end of the run, when most of it trains.

    Raises:
      UserError: it has not, with one image a device (or micro-batch) that the network shrinks to one pixel.
    """
    last = len(order[order.steps_per_epoch - 1])
    parts = config.optim.accumulate
    if parallel.statistics_axis(config.parallel.batch_norm) is None:
        parts *= len(parallel.devices)
    for rows, what in ((config.data.batch_size, "a batch"), (last, "the last batch of an epoch")):
        if rows // parts != 1:
            continue
        model, size = at_epoch(config, make_model(config, 2), rules, math.inf), config.data.image_size
        shapes, image = variable_shapes(model, size), jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
        try:
            jax.eval_shape(lambda v, x, m=model: m.apply(v, x, train=True, mutable=["batch_stats"]), shapes, image)
        except OneValueError:
            raise cli.UserError(
                f"{what} leaves one image of {size} px to batch norm: one value a channel, whose variance is undefined",
                "take another --config.data.batch_size, --config.data.last_batch=drop, or larger images",
            ) from None


def at_epoch(config: ConfigDict, model: nn.Module, rules: trainable.Rules, epoch: float) -> nn.Module:
    """`model` whose batch norms run on running statistics in all that is frozen at `epoch`."""
    if config.model.batch_norm == "frozen":
        return model
    return model.clone(frozen=trainable.frozen_modules(config, rules, epoch))


def train_step_of(
    config: ConfigDict,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    axis_name: str | None,
    *,
    frozen: Collection[str] = (),
    average: Move | None = None,
) -> Callable[..., Any]:
    """The body of the update that the config asks for; `frozen` and `average` as for `make_train_step`."""
    return make_train_step(
        objective,
        optimizer,
        seed=config.seed,
        accumulate=config.optim.accumulate,
        sam=config.optim.sam,
        frozen=frozen,
        average=average,
        axis_name=axis_name,
    )


def prepare(config: ConfigDict) -> tuple[Job, str]:
    """Open the data, port the weights, build the steps, saying so; and a line that says what will be trained.

    Raises:
      UserError: the data, the weights or the config do not allow it.
    """
    parallel = all_devices(config)
    parallel.check_batch(config.data.batch_size, config.optim.accumulate)
    shapes = checked_shapes(make_model(config, 2), config.data.image_size)
    rules = trainable.rules(config, shapes["params"])  # its patterns, before anything is fetched
    tell = cli.say if parallel.is_main else lambda text: None
    tell(f"reading {config.data.source} ...")
    train_source, eval_source = open_data(config)
    unlabelled = open_unlabelled(config)
    order_of_unlabelled = unlabelled and unlabelled_order(config, unlabelled)
    order = order_of(config, train_source, parallel)
    teacher = load_teacher(config, train_source.class_names)
    check_batch_norm(config, parallel, order, rules)
    total_steps = config.train.steps or max(round(config.train.epochs * order.steps_per_epoch), 1)
    rate = make_schedule(config, order.steps_per_epoch, total_steps)
    phases = trainable.phases(rules, order.steps_per_epoch, total_steps)
    statistics_axis = parallel.statistics_axis(config.parallel.batch_norm)
    tell(
        f"making {config.model.arch} of {config.model.weights} ..." if config.model.weights else "making the model ..."
    )
    model, variables, card, said, fresh = initial(
        config, train_source.class_names, load_pretrained, statistics_axis, parallel.devices
    )
    rules = trainable.rules(config, variables["params"], fresh)
    card = dataclasses.replace(card, multi_label=train_source.multi_label)
    bad_files = BadFiles(config.data.on_error)
    options = {"workers": config.data.workers, "share": parallel.share, "bad": bad_files}
    mixing = bool(config.train.mixup or config.train.cutmix)
    names = tuple(config.data.augment)
    plans = TrainPlan(order, partners=mixing), EvalPlan(len(eval_source), config.data.batch_size)
    train_loader = make_loader(train_source, plans[0], parallel, card.preprocessing, augmentations=names, **options)
    eval_loader = make_loader(eval_source, plans[1], parallel, card.preprocessing, **options)
    of_unlabelled = None
    if unlabelled and order_of_unlabelled:
        plan = TrainPlan(order_of_unlabelled)
        views = make_loader(unlabelled, plan, parallel, card.preprocessing, augmentations=names, **options)
        train_loader, of_unlabelled = WithUnlabelled(train_loader, views), views.preprocessing
    if teacher:
        train_loader.dataset["teacher"] = parallel.replicate(teacher[1])
    left, axis_name = train_loader.preprocessing, parallel.axis_name
    loss = loss_of(config, axis_name, numeric_weights(config, train_source.labels, card.num_classes))
    average = average_of(config, total_steps, order.steps_per_epoch)

    def optimizer_at(epoch: float) -> optax.GradientTransformationExtraArgs:
        return make_optimizer(config, variables["params"], rate, fresh, epoch)

    def phase(after: int, epoch: float) -> Phase:
        network = at_epoch(config, model, rules, epoch)
        objective = Objective.of(config, network, left, loss, teacher and teacher[0], of_unlabelled)
        waiting = trainable.waiting(rules, epoch)
        step = train_step_of(config, objective, optimizer_at(epoch), axis_name, frozen=waiting, average=average)
        several = make_several(step)
        return Phase(after, *(parallel.compile(body, donate_first=True) for body in (step, several)))

    first, *later = (phase(after, epoch) for after, epoch in phases)
    eval_step = make_eval_step(model, eval_loader.preprocessing, axis_name=parallel.axis_name)
    statistics_step = None
    if config.train.swa_epochs:
        inputs = Objective.of(config, model, left, loss).inputs
        network = at_epoch(config, model, rules, phases[-1][1])
        statistics_step = make_statistics_step(network, inputs, seed=config.seed, axis_name=axis_name)
    is_float16 = resolved_precision(config.train.precision, parallel.devices) == "float16"
    optimizer = optimizer_at(phases[0][1])
    state = TrainState.create(variables, optimizer, with_average=average is not None, with_loss_scale=is_float16)
    job = Job(
        config=config,
        card=card,
        data=fingerprint(train_source, eval_source, unlabelled),
        parallel=parallel,
        train_source=train_source,
        order=order,
        total_steps=total_steps,
        rates=np.asarray(rate(np.arange(total_steps, dtype=np.int32))),
        state=parallel.replicate(state),
        train_step=first.train_step,
        several_steps=first.several_steps,
        eval_step=parallel.compile(eval_step),
        statistics_step=statistics_step and parallel.compile(statistics_step),
        train_loader=train_loader,
        eval_loader=eval_loader,
        bad_files=bad_files,
        precision=precision_said(config.train.precision, config.train.matmul_precision, parallel.devices),
        rules=rules,
        later=tuple(later),
    )
    images = f"{len(train_source)} images to train on{of_split(train_source)}, {len(eval_source)} to evaluate on"
    if unlabelled is not None:
        images = f"{len(unlabelled)} without labels and {images}"
    if teacher:
        said += f", taught by {config.train.teacher}"
    parts = (said, f"{images}{of_split(eval_source)}", scaling_said(config), str(parallel), job.precision)
    return job, "; ".join(filter(None, parts))
