"""A run made ready from its config: the data opened, the weights ported, the steps made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft.data.base import Part, Source
from jaxsft.data.fingerprint import fingerprint
from jaxsft.data.loader import BadFiles, Loader, WithUnlabelled, make_loader
from jaxsft.data.order import Order
from jaxsft.data.reading import EvalPlan, TrainPlan
from jaxsft.data.sources import open_splits, open_unlabelled
from jaxsft.learn import trainable
from jaxsft.learn.losses import numeric_weights
from jaxsft.learn.schedule import make_schedule, scaling_said
from jaxsft.models.family import variable_shapes
from jaxsft.models.initial import checked_shapes, initial, make_model
from jaxsft.models.layers import OneValueError
from jaxsft.models.precision import said as precision_said
from jaxsft.run import labelling, probe
from jaxsft.run.evaluation import of_split
from jaxsft.run.job import Job
from jaxsft.run.parallel import DataParallel, all_devices
from jaxsft.run.pretrained import load_pretrained
from jaxsft.run.program import Program, at_epoch
from jaxsft.run.shared import Shared
from jaxsft.run.teacher import load_teacher

MAKING = "making the model ..."
UNLABELLED = 2**62  # added to the seed, so that both streams are in orders of their own


def check_data(config: ConfigDict, train_source: Source) -> None:
    """Find out whether there is enough to train on, of the kind that the config is for.

    Raises:
      UserError: there are fewer training images than one batch takes, or a single class, or images have several labels
        and the config is for one, or the other way round.
    """
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
    rules = trainable.rules(config, shapes["params"])  # its patterns, before anything is fetched
    tell = cli.say if parallel.is_main else lambda text: None
    if splits is None:
        tell(f"reading {config.data.source} ...")
    train_source, eval_source = open_splits(config) if splits is None else splits
    check_data(config, train_source)
    unlabelled = open_unlabelled(config)
    order_of_unlabelled = unlabelled and unlabelled_order(config, unlabelled)
    order = order_of(config, train_source, parallel)
    teacher, taught_by = load_teacher(config, train_source.class_names)
    check_batch_norm(config, parallel, order, rules)
    every = order.steps_per_epoch
    total = config.train.steps or max(round(config.train.epochs * every), 1)
    rate = make_schedule(config, every, total)
    trainable.phases(rules, every, total)  # whether they end in time

    def make() -> Any:
        tell(f"making {config.model.arch} of {config.model.weights} ..." if config.model.weights else MAKING)
        axis_name = parallel.statistics_axis(config.parallel.batch_norm)
        return initial(config, train_source.class_names, load_pretrained, axis_name, parallel.devices)

    made = shared.initial(config, train_source.class_names, parallel, make) if shared else make()
    model, variables, card, said, fresh = made
    card = dataclasses.replace(card, multi_label=train_source.multi_label)
    bad_files = BadFiles(config.data.on_error)
    options: dict[str, Any] = {"workers": config.data.workers, "share": parallel.share, "bad": bad_files}
    options["cache"] = config.data.cache
    if shared and isinstance(train_source, Part):
        options["dataset"] = shared.dataset(train_source.whole, parallel)
    train_options = {**options, "augmentations": tuple(config.data.augment)}
    mixing = bool(config.train.mixup or config.train.cutmix)
    plan, evaluated = TrainPlan(order, partners=mixing), EvalPlan(len(eval_source), config.data.batch_size)
    train_loader: Loader = make_loader(train_source, plan, parallel, card.preprocessing, **train_options)
    eval_loader = make_loader(eval_source, evaluated, parallel, card.preprocessing, **options)
    of_unlabelled = None
    if unlabelled and order_of_unlabelled:
        plan = TrainPlan(order_of_unlabelled)
        views = make_loader(unlabelled, plan, parallel, card.preprocessing, **{**train_options, "dataset": None})
        train_loader, of_unlabelled = WithUnlabelled(train_loader, views), views.preprocessing
    if teacher:
        train_loader.dataset = {**train_loader.dataset, "teacher": parallel.replicate(taught_by)}  # it may be shared
    program = (Program if shared is None else shared.program)(
        config=config,
        model=model,
        params=jax.eval_shape(lambda: variables["params"]),
        rate=rate,
        every=every,
        total=total,
        parallel=parallel,
        fresh=fresh,
        left=train_loader.preprocessing,
        to_evaluate=eval_loader.preprocessing,
        of_unlabelled=of_unlabelled,
        class_weights=numeric_weights(config, train_source.labels, card.num_classes),
        teacher=teacher,
    )
    train_loader.dataset = program.dataset(train_loader.dataset)
    first, *later = program.phases()
    begin, kept = probe.beginning(program, variables, eval_source)
    job = Job(
        config=config,
        card=card,
        data=fingerprint(train_source, eval_source, unlabelled),
        parallel=parallel,
        train_source=train_source,
        eval_source=eval_source,
        order=order,
        total_steps=total,
        rates=np.asarray(rate(np.arange(total, dtype=np.int32))),
        state=program.state(variables),
        train_step=first.train_step,
        several_steps=first.several_steps,
        eval_step=program.evaluation(),
        statistics_step=program.statistics(),
        train_loader=train_loader,
        eval_loader=eval_loader,
        bad_files=bad_files,
        precision=precision_said(config.train.precision, config.train.matmul_precision, parallel.devices),
        rules=program.rules,
        later=tuple(later),
        begin=begin,
    )
    unseen = f"{len(unlabelled)} without labels, " if unlabelled else ""
    images = f"{unseen}{len(train_source)} images to train on{of_split(train_source)}"
    images += f", {len(eval_source)} to evaluate on{of_split(eval_source)}"
    taught = f"taught by {config.train.teacher}" if teacher else ""
    parts = (said, taught, images, scaling_said(config), str(parallel))
    return job, "; ".join(filter(None, (*parts, job.precision, kept)))
