"""A run made ready: its data, its state and its compiled steps, all that the loop of `train` needs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft.data.augment import Amounts
from jaxsft.data.base import Part, Source
from jaxsft.data.fingerprint import fingerprint
from jaxsft.data.loader import BadFiles, Loader, make_loader
from jaxsft.data.order import Order
from jaxsft.data.reading import EvalPlan, TrainPlan
from jaxsft.data.sources import open_splits
from jaxsft.interpret.metrics import Evaluation
from jaxsft.learn import trainable
from jaxsft.learn.losses import loss_of
from jaxsft.learn.optim import make_optimizer
from jaxsft.learn.schedule import Schedule, make_schedule
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_eval_step, make_several, make_train_step
from jaxsft.models.family import variable_shapes
from jaxsft.models.initial import checked_shapes, initial, make_model
from jaxsft.models.layers import OneValueError
from jaxsft.models.precision import said as precision_said
from jaxsft.models.weights import ModelCard, Preprocessing
from jaxsft.run.evaluation import evaluate, of_split
from jaxsft.run.parallel import DataParallel, all_devices
from jaxsft.run.pretrained import load_pretrained
from jaxsft.run.shared import KEY, Shared, Steps, devices_key, numbers_of, program_key, taking_numbers


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
    train_step: Callable[..., Any]
    several_steps: Callable[..., Any]  # `train_step` for a list of batches in one call
    eval_step: Callable[..., Any]
    train_loader: Loader
    eval_loader: Loader
    bad_files: BadFiles
    precision: str  # what it is computed in, for people

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
        return any(step % n == 0 for n in every) or self.is_evaluated(step)

    def update(self, steps: range) -> dict[str, jax.Array]:
        """Make these updates (from 1) and return the sums of each batch, scalars or [updates], still on their way."""
        batches = [self.train_loader.batch(step - 1) for step in steps]
        update, argument = (self.train_step, batches[0]) if len(batches) == 1 else (self.several_steps, batches)
        self.state, counts = update(self.state, self.train_loader.dataset, argument)
        return counts

    def evaluate(self, between: Callable[[], None] = lambda: None) -> Evaluation:
        """The current state on the whole eval split; `between` is called after each batch and may raise."""
        return evaluate(self.eval_step, self.state.evaluated(), self.eval_loader, between)

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


def check_data(config: ConfigDict, train_source: Source) -> None:
    """Find out whether there is enough to train on.

    Raises:
      UserError: there are fewer training images than one batch takes, or a single class.
    """
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


def check_batch_norm(config: ConfigDict, parallel: DataParallel, order: Order) -> None:
    """Find out whether batch norm has more than one value a channel to train on, in the last batch too.

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
        model, size = make_model(config, 2), config.data.image_size
        shapes, image = variable_shapes(model, size), jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
        try:
            jax.eval_shape(lambda v, x, m=model: m.apply(v, x, train=True, mutable=["batch_stats"]), shapes, image)
        except OneValueError:
            raise cli.UserError(
                f"{what} leaves one image of {size} px to batch norm: one value a channel, whose variance is undefined",
                "take another --config.data.batch_size, --config.data.last_batch=drop, or larger images",
            ) from None


def train_step_of(
    config: ConfigDict,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing | None,
    axis_name: str | None,
) -> Callable[..., Any]:
    """The body of the update that the config asks for."""
    train = config.train
    return make_train_step(
        model,
        optimizer,
        preprocessing,
        augmentations=tuple(config.data.augment),
        amounts=Amounts.of(config),
        mixup=train.mixup,
        cutmix=train.cutmix,
        seed=config.seed,
        loss=loss_of(config, axis_name),
        accumulate=config.optim.accumulate,
        ema=train.ema,
        axis_name=axis_name,
    )


def steps_of(
    config: ConfigDict,
    model: nn.Module,
    params: Any,
    rate: Schedule,
    loaders: tuple[Loader, Loader],
    parallel: DataParallel,
    shared: Shared | None,
) -> Steps:
    """The compiled steps for the loaders of training and of evaluation; those of `shared` take its numbers."""
    to_train, to_evaluate = (loader.preprocessing for loader in loaders)
    params = jax.eval_shape(lambda: params)

    def make(own: ConfigDict, rate: Schedule) -> Callable[..., Any]:
        return train_step_of(own, model, make_optimizer(own, params, rate), to_train, parallel.axis_name)

    def compiled() -> Steps:
        body = make(config, rate) if shared is None else taking_numbers(config, make)
        evaluation = make_eval_step(model, to_evaluate, axis_name=parallel.axis_name)
        return Steps(
            parallel.compile(body, donate_first=True),
            parallel.compile(make_several(body), donate_first=True),
            parallel.compile(evaluation),
        )

    if shared is None:
        return compiled()
    key = program_key(config), model.num_classes, to_train, to_evaluate, devices_key(parallel)
    return shared.once(key, compiled)


def prepare(
    config: ConfigDict, splits: tuple[Source, Source] | None = None, shared: Shared | None = None
) -> tuple[Job, str]:
    """Open the data, port the weights, build the steps, saying so; and a line that says what will be trained.

    Args:
      config: of the run.
      splits: what is trained and evaluated on, where that is open already; None: as the config says.
      shared: what runs of this process have made so far, to be used by this one; None: it stands alone.

    Raises:
      UserError: the data, the weights or the config do not allow it.
    """
    parallel = all_devices(config)
    parallel.check_batch(config.data.batch_size, config.optim.accumulate)
    shapes = checked_shapes(make_model(config, 2), config.data.image_size)
    trainable.frozen_parameters(config, shapes["params"])  # its patterns, before anything is fetched
    tell = cli.say if parallel.is_main else lambda text: None
    if splits is None:
        tell(f"reading {config.data.source} ...")
    train_source, eval_source = open_splits(config) if splits is None else splits
    check_data(config, train_source)
    order = order_of(config, train_source, parallel)
    check_batch_norm(config, parallel, order)
    total_steps = config.train.steps or max(round(config.train.epochs * order.steps_per_epoch), 1)
    statistics_axis = parallel.statistics_axis(config.parallel.batch_norm)

    def make() -> tuple[nn.Module, dict[str, Any], ModelCard, str]:
        of_weights = f"{config.model.arch} of {config.model.weights}" if config.model.weights else "the model"
        tell(f"making {of_weights} ...")
        made = initial(config, train_source.class_names, load_pretrained, statistics_axis, parallel.devices)
        return made if shared is None else (made[0], jax.device_get(made[1]), *made[2:])  # a step donates its memory

    key = "initial", program_key(config), config.model.weights, config.model.checkpoint, train_source.class_names
    model, variables, card, said = shared.once((*key, devices_key(parallel)), make) if shared else make()
    rate = make_schedule(config, order.steps_per_epoch, total_steps)
    optimizer = make_optimizer(config, variables["params"], rate)
    bad_files = BadFiles(config.data.on_error)
    options: dict[str, Any] = {"workers": config.data.workers, "share": parallel.share, "bad": bad_files}
    mixing = bool(config.train.mixup or config.train.cutmix)
    names = tuple(config.data.augment)
    plans = TrainPlan(order, partners=mixing), EvalPlan(len(eval_source), config.data.batch_size)
    if shared and isinstance(train_source, Part):
        options["dataset"] = shared.dataset(train_source.whole, parallel)
    train_loader = make_loader(train_source, plans[0], parallel, card.preprocessing, augmentations=names, **options)
    eval_loader = make_loader(eval_source, plans[1], parallel, card.preprocessing, **options)
    steps = steps_of(config, model, variables["params"], rate, (train_loader, eval_loader), parallel, shared)
    rates = np.asarray(rate(np.arange(total_steps, dtype=np.int32)))
    if shared:
        train_loader.dataset = {**train_loader.dataset, KEY: parallel.replicate(numbers_of(config, rates))}
    job = Job(
        config=config,
        card=card,
        data=fingerprint(train_source, eval_source),
        parallel=parallel,
        train_source=train_source,
        order=order,
        total_steps=total_steps,
        rates=rates,
        state=parallel.replicate(TrainState.create(variables, optimizer, with_average=config.train.ema > 0)),
        train_step=steps.train,
        several_steps=steps.several,
        eval_step=steps.evaluate,
        train_loader=train_loader,
        eval_loader=eval_loader,
        bad_files=bad_files,
        precision=precision_said(config.train.precision, config.train.matmul_precision, parallel.devices),
    )
    images = f"{len(train_source)} images to train on{of_split(train_source)}, {len(eval_source)} to evaluate on"
    return job, f"{said}; {images}{of_split(eval_source)}; {parallel}; {job.precision}"
