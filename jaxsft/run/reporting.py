"""What a report tells of a run, gathered at the end of its training or from its folder; and the file that is left."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import PIL.Image
from flax import traverse_util
from ml_collections import ConfigDict

from jaxsft import cli
from jaxsft import config as config_module
from jaxsft.cli import Stop, UserError
from jaxsft.data.base import Source
from jaxsft.data.classes import said
from jaxsft.data.loader import BAD_FILES
from jaxsft.data.sources import open_splits
from jaxsft.interpret.mistakes import Mistake, rank, unsure
from jaxsft.interpret.multilabel import Result
from jaxsft.interpret.report.reported import Gallery, Reported
from jaxsft.learn import trainable
from jaxsft.learn.schedule import peak_lr
from jaxsft.models.initial import checked_shapes, make_model
from jaxsft.models.precision import said as precision_said
from jaxsft.models.weights import ModelCard, Preprocessing
from jaxsft.run import evaluation, saved, starts
from jaxsft.run.job import Job
from jaxsft.run.log import records
from jaxsft.run.parallel import all_devices
from jaxsft.run.saved import Run
from jaxsft.run.workdir import known_data
from jaxsft.run.working_copy import WorkingCopy
from jaxsft.storage import Location

REPORT = "report.html"
PICTURES = 24  # of each kind
INPUTS = 32  # of the first batch
SIDE = 128  # px, the longer side of a picture
SECONDS = 10.0  # to read the pictures of a kind


def of_folder(workdir: Location, place: Location, config: ConfigDict, card: ModelCard, rules: trainable.Rules) -> Any:
    """What `Reported` says of a run without its answers, by name.

    Args:
      workdir: where its files are read.
      place: what to call that.
      config, card: of the run.
      rules: of its parameters.
    """
    flat = config_module.flatten(json.loads(config_module.to_json(config)))
    usual = config_module.flatten(json.loads(config_module.to_json(config_module.default())))
    trained = [math.prod(rule.shape) for rule in rules.values() if rule.start is not None]
    return {
        "name": place.name or str(place),
        "place": str(place),
        "config": config,
        "changed": {key: value for key, value in flat.items() if value != usual.get(key)},
        "card": card,
        "records": records(workdir),
        "starts": starts.read(workdir),
        "data": known_data(workdir) or {},
        "parameters": [trainable.COLUMNS, *trainable.table(rules, peak_lr(config))],
        "sizes": (sum(trained), sum(math.prod(rule.shape) for rule in rules.values())),
        "left_out": left_out(workdir),
    }


def of_job(job: Job, workdir: WorkingCopy, result: Result) -> Reported:
    """A run at the end of its training, whose last evaluation is `result`."""
    known = of_folder(workdir.path, workdir.place, job.config, job.card, job.rules)
    answered = of_answers(result, job.eval_source, job.card)
    augmented = inputs(job.config, job.train_source, job.card.preprocessing)
    on = evaluation.of_split(job.eval_source)
    more: dict[str, Any] = {
        "precision": job.precision,
        "step": job.total_steps,
        "evaluated_on": on,
        "augmented": augmented,
    }
    return Reported(**known, **answered, **more)


def of_answers(result: Result, source: Source, card: ModelCard) -> dict[str, Any]:
    """What `Reported` says of an evaluation, by name: the pictures are those of `source`, which it was of."""
    answers = result.answers
    return {
        "result": result,
        "wrong": pictured(source, rank(answers, PICTURES), answers, card.names),
        "unsure": pictured(source, unsure(answers, PICTURES), answers, card.names),
    }


def pictured(source: Source, rows: np.ndarray, answers: Mapping[str, np.ndarray], names: tuple[str, ...]) -> Gallery:
    """The pictures of some answers, small; those that can't be read any more, or in SECONDS, are left out and counted.

    Args:
      source: that the answers are about.
      rows: which answers, int [n].
      answers: "example", "label", "predicted", "probability" [N].
      names: of the classes.
    """

    found: list[Mistake] = []
    until = time.monotonic() + SECONDS
    for row in rows.tolist():
        number = int(answers["example"][row])
        with contextlib.suppress(Exception):  # a source is anyone's, and the file may be gone
            image = small(source[number])
            label, predicted = (said(answers[name][row], names) for name in ("label", "predicted"))
            found.append(Mistake(source.name(number), image, label, predicted, float(answers["probability"][row])))
        if time.monotonic() > until:
            break
    missing = f"{len(rows) - len(found)} of {len(rows)} images could not be read." if len(found) < len(rows) else ""
    return Gallery(found, missing if len(rows) else "There are none.")


def small(image: Any) -> PIL.Image.Image:
    """An image of SIDE px at most."""
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image.copy()
    image.thumbnail((SIDE, SIDE))
    return image


def inputs(config: ConfigDict, source: Source, to: Preprocessing) -> Gallery:
    """Training images as the model sees them."""
    from jaxsft.data import show

    try:
        images, labels = show.batch_of(config, source, to, INPUTS)
    except (Stop, OSError) as error:
        return Gallery((), f"They can't be read: {error}")
    levels = (images * 255).round().astype(np.uint8)
    names = [said(label, source.class_names) for label in labels]
    return Gallery([Mistake("", small(image), name, name, math.nan) for image, name in zip(levels, names)])


def left_out(workdir: Location) -> int:
    """How many images the run could not read."""
    with contextlib.suppress(OSError):
        return len((workdir / BAD_FILES).read_text(errors="replace").splitlines())
    return 0


def of_workdir(workdir: Location, which: str = "last", data: str = "", split: str = "", data_dir: str = "") -> Reported:
    """A run read back from its folder, finished or not, and evaluated.

    Where its checkpoint or its images can't be had, the report says so in place of what they would show; where another
    checkpoint or other images are asked for, that is an error.

    Args:
      workdir: of the run.
      which: checkpoint: 'last', 'best' or a step.
      data, split, data_dir: as for `evaluation.open_examples`.

    Raises:
      UserError: there is no run, or not what was asked for.
    """
    asked = which != "last" or bool(data or split or data_dir)
    check_run(workdir)
    config, card = saved.read_config(workdir), saved.read_card(workdir)
    devices = all_devices(config).devices
    known = of_folder(workdir, workdir, config, card, rules_of(config, card))
    precision = precision_said(config.train.precision, config.train.matmul_precision, devices)
    known["precision"] = known["starts"][-1].get("precision", precision) if known["starts"] else precision
    try:
        run = saved.load_run(workdir, which)
        examples = evaluation.open_examples(run, data, split, data_dir)
        result = evaluation.evaluate_run(run, examples)
    except Stop as stop:
        if asked:
            raise
        return Reported(**known, missing=f"It could not be evaluated: {stop}")
    answered = of_answers(result, examples.source, card)
    on = f" of {data}" * bool(data) + evaluation.of_split(examples.source)
    return Reported(**known, **answered, step=run.step, evaluated_on=on, augmented=training_inputs(run))


def check_run(workdir: Location) -> None:
    """Raise a UserError where `workdir` holds no run."""
    if not saved.is_run(workdir):
        raise UserError(f"{workdir} holds no run", "give the --workdir of `python -m jaxsft.train`")


def training_inputs(run: Run) -> Gallery:
    """As `inputs`, of the training images that a saved run names."""
    try:
        source = open_splits(run.config)[0]
    except Stop as stop:
        return Gallery((), f"They can't be read: {stop}")
    return inputs(run.config, source, run.card.preprocessing)


def rules_of(config: ConfigDict, card: ModelCard) -> trainable.Rules:
    """How each parameter of a saved run was trained. A head that may have been replaced is taken to be new."""
    shapes = checked_shapes(make_model(config, card.num_classes), config.data.image_size)["params"]
    paths: Iterable[str] = traverse_util.flatten_dict(shapes, sep="/")
    new = () if config.model.head == "keep" else [p for p in paths if p.startswith(f"{trainable.head_of(config)}/")]
    return trainable.rules(config, shapes, tuple(new))


def command(workdir: Location) -> str:
    """What makes a run's report anew."""
    return f"python -m jaxsft.report --workdir {shlex.quote(str(workdir))}"


def warn_of(error: Exception, workdir: Location) -> None:
    """Say that a run has no report, and how to make one."""
    cli.warn(f"no {REPORT} could be made: {type(error).__name__}: {error}; `{command(workdir)}` makes it")
