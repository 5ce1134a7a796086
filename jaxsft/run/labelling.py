"""Whether what a config asks for, and what a model is, go with the labels of the data: one an image, or several."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxsft.cli import UserError
from jaxsft.data.base import Source
from jaxsft.interpret.multilabel import METRICS
from jaxsft.models.weights import ModelCard

KINDS = {False: "one label an image", True: "images with any number of labels"}


def check(config: ConfigDict, source: Source) -> None:
    """Find out before the model is made whether a run can train on `source`.

    Raises:
      UserError: a setting for one label an image, and the data have several, or the other way round.
    """
    name, metric, classes = config.data.source, config.checkpoint.best_metric, len(source.class_names)
    for is_so, what, what_to_do in (
        (
            source.multi_label and config.train.loss == "cross_entropy",
            f"config.train.loss is 'cross_entropy', and {name} has {KINDS[True]}",
            "set --config.train.loss=bce or focal",
        ),
        (
            source.multi_label and config.data.sampling == "balanced",
            f"config.data.sampling is 'balanced', and {name} has {KINDS[True]}",
            "set it to shuffle; --config.train.class_weights=balanced weighs the classes",
        ),
        (
            source.multi_label and config.model.num_classes not in (None, classes),
            f"config.model.num_classes is {config.model.num_classes}, and {name} has {KINDS[True]}",
            f"leave it out, for a head of {classes}",
        ),
        (
            source.multi_label and metric == "top5",
            f"config.checkpoint.best_metric is 'top5', and {name} has {KINDS[True]}",
            f"take one of accuracy, loss, {', '.join(METRICS)}",
        ),
        (
            not source.multi_label and metric in METRICS,
            f"config.checkpoint.best_metric is {metric!r}, and {name} has {KINDS[False]}",
            "take one of accuracy, top5, loss, or name --config.data.label_delimiter",
        ),
    ):
        if is_so:
            raise UserError(what, what_to_do)


def check_kind(source: Source, name: str, card: ModelCard) -> None:
    """Raise a UserError where the model of `card` was trained for another kind of labels than those of `source`."""
    if source.multi_label != card.multi_label:
        what = f"{name} has {KINDS[source.multi_label]}, and the model was trained for {KINDS[card.multi_label]}"
        raise UserError(what, "name data such as it was trained for")
