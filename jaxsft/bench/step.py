"""The step that training runs, from a config, without data or weights: to be timed, or compiled for elsewhere."""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxsft import cli, config
from jaxsft.learn.schedule import make_schedule
from jaxsft.learn.state import TrainState
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.initial import checked_shapes, make_model, preprocessing
from jaxsft.run.parallel import DataParallel
from jaxsft.run.program import Program

CLASSES = 1000


class Steps(NamedTuple):
    """Both steps on the devices, not yet compiled, and what they take."""

    model: nn.Module
    optimizer: optax.GradientTransformation
    train: Any  # jitted: to be called or lowered
    evaluate: Any
    state: TrainState  # shapes
    batch: dict[str, Any]  # shapes, of the global batch
    arguments: dict[str, Any]  # of the train step, beside images: on the host


def whole(text: str) -> int:
    """Argparse's `type` for a number of things: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def above_zero(text: str) -> float:
    """Argparse's `type` for a finite amount above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The options that say which step."""
    parser.add_argument("--arch", default=defaults["arch"], choices=list(ARCHITECTURES), metavar="ARCH")
    parser.add_argument("--image-size", type=whole, default=224, help="px; default: %(default)s")
    parser.add_argument(
        "--batch-size", type=whole, default=defaults["batch_size"], help="over all devices; default: %(default)s"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default=defaults["precision"])
    parser.add_argument("--matmul-precision", choices=("default", "high", "highest"), default="default")
    parser.add_argument("--backend", choices=("pmap", "shard_map"), default="pmap")
    parser.add_argument("--batch-norm", choices=("local", "sync"), default="local", help="statistics of each device")
    parser.add_argument("--remat", action="store_true", help="train.remat: recompute instead of keep")


def config_of(args: argparse.Namespace) -> ConfigDict:
    """The config of a run with those options: SGD with momentum, no augmentation, images of the size the model sees.

    Raises:
      UserError: a value out of range.
    """
    c = config.default()
    c.model.arch, c.model.weights, c.model.num_classes = args.arch, "", CLASSES
    c.data.image_size, c.data.batch_size, c.data.augment = args.image_size, args.batch_size, ()
    c.train.precision, c.train.matmul_precision, c.train.remat = args.precision, args.matmul_precision, args.remat
    c.parallel.backend, c.parallel.batch_norm = args.backend, args.batch_norm
    config.check(c)
    return c


def make_steps(c: ConfigDict, parallel: DataParallel, model: nn.Module | None = None) -> Steps:
    """The steps of a config, by the same functions as in training; with `model` around another network.

    Raises:
      UserError: the batch does not split over the devices, or the network can't take images of that size.
    """
    parallel.check_batch(c.data.batch_size)
    model = model or make_model(c, CLASSES, parallel.statistics_axis(c.parallel.batch_norm), parallel.devices)
    shapes = checked_shapes(model, c.data.image_size)
    size = c.data.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((c.data.batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((c.data.batch_size,), jnp.int32),
        "example": jax.ShapeDtypeStruct((c.data.batch_size,), jnp.int32),
    }
    to, rate = preprocessing(c), make_schedule(c, 1000, 10_000)
    program = Program(c, model, shapes["params"], rate, 1000, 10_000, parallel, left=to, to_evaluate=to)
    return Steps(
        model,
        program.optimizer(),
        program.phases()[0].train_step,
        program.evaluation(),
        jax.eval_shape(lambda variables: TrainState.create(variables, program.optimizer()), shapes),
        batch,
        program.arguments(),
    )


def missing(package: str, extra: str) -> cli.UserError:
    """What to say where an optional package is not there."""
    return cli.UserError(f"{package} is not installed", f"pip install 'jaxsft[{extra}]'")
