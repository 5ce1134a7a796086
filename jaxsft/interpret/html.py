"""`report.html` of a finished run: curves, accuracy by class, confusions, and what was run. One file, no scripts."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from ml_collections import ConfigDict

from jaxsft.cli import printable
from jaxsft.interpret.metrics import Evaluation
from jaxsft.interpret.multilabel import METRICS, MultiLabelEvaluation, Result
from jaxsft.models.weights import ModelCard

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% } h1 { font-size: 1.4rem }
"""
MOST_CLASSES = 100  # beyond that a confusion matrix is a grey square
CALLED = {"map": "mAP", "f1_micro": "F1, micro", "f1_macro": "F1, macro"}
FEW_POINTS = 30  # of a curve: each is marked, so that a single one is seen, too


def page(
    title: str,
    card: ModelCard,
    config: ConfigDict,
    precision: str,
    records: list[dict[str, Any]],
    result: Result,
    batch: matplotlib.figure.Figure,
    parameters: Sequence[tuple[str, ...]] = (),
) -> str:
    """The report of a run as HTML, its pictures inside.

    Args:
      title: what the run is called.
      card: of its model.
      config: of the run.
      precision: what it was computed in, as `models.precision.said` puts it.
      records: the lines of its metrics.jsonl.
      result: its last evaluation.
      batch: a picture of a batch as the model sees it.
      parameters: how each was trained, a row each after that of the columns' names; or nothing.
    """
    names = tuple(map(printable, card.names))
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}: {html.escape(result.summary())}</h1>",
        table([(key, value) for key, value in facts(card, precision, records)]),
        picture(curves(records, training_loss(config, card.multi_label))),
        "<h2>By class</h2>",
    ]
    if isinstance(result, MultiLabelEvaluation):
        parts.append(of_several_labels(result, names))
    else:
        parts.append(table([(names[k], percent(value)) for k, value in by_accuracy(result)]))
    if isinstance(result, Evaluation) and card.num_classes <= MOST_CLASSES:
        with matplotlib.rc_context({"text.parse_math": False}):  # what stands between two $ of a name is no formula
            parts += ["<h2>Confusions</h2>", picture(confusion(result.confusion, names))]
    parts += ["<h2>Of the first batch</h2>", picture(batch)]
    if parameters:
        parts.append(f"<h2>Parameters</h2>{folded(f'{len(parameters) - 1} in all', parameters)}")
    configuration = html.escape(json.dumps(config.to_dict(), indent=2))
    parts.append(f"<h2>Config</h2><pre>{configuration}</pre>")
    return "\n".join(parts)


def facts(card: ModelCard, precision: str, records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What was trained, from what, how long and how fast."""
    speeds = [r["images_per_sec"] for r in records if "images_per_sec" in r]
    seconds = records[-1]["time"] - records[0]["time"]
    p = card.preprocessing
    size = f"short side {p.resize_size} px ({p.interpolation})"
    return [
        ("model", f"{card.arch}, {card.num_classes} classes{', any number of them an image' * card.multi_label}"),
        ("weights", f"{card.source} {card.weights_version}".strip() or "from scratch"),
        ("sha256 of the weights", card.sha256 or "-"),
        ("input", f"{size}, middle {p.crop_size} px, mean {p.mean}, deviation {p.std}"),
        ("steps", str(records[-1]["step"])),
        ("computed in", precision),
        ("speed", f"{np.median(speeds):.0f} images/s (median)" if speeds else "-"),
        ("from the first line of the log to the last", f"{seconds:.0f} s"),
    ]


def training_loss(config: ConfigDict, multi_label: bool = False) -> str:
    """What the loss of training is, where it is not the plain one that evaluation has; else ''.

    That is cross-entropy, of several labels an image binary cross-entropy.
    """
    train = config.train
    names = {"bce": "binary cross-entropy", "focal": f"focal loss of gamma {train.focal_gamma:g}"}
    is_other = train.loss != ("bce" if multi_label else "cross_entropy")
    parts = {"label smoothing": train.label_smoothing, "mixup": train.mixup, "cutmix": train.cutmix}
    said = [f"{name} {value:g}" for name, value in parts.items() if value]
    loss = [names.get(train.loss, "cross-entropy")] if is_other else []
    return ", ".join([*loss, *said, *(["class weights"] if len(train.class_weights) else [])])


def curves(records: list[dict[str, Any]], other_loss: str = "") -> matplotlib.figure.Figure:
    """Loss and accuracy over the epochs, in training and in evaluation; of several labels an image their METRICS too.

    Where the loss of training is an `other_loss` than evaluation's, its curve says so: the two have no common scale.
    """
    several = any(name in record for record in records for name in METRICS)
    figure = matplotlib.figure.Figure(figsize=(13.5 if several else 9, 3.2), layout="constrained")
    for axes, quantities in zip(figure.subplots(1, 2 + several), (("loss",), ("accuracy",), METRICS)):
        plot(axes, records, quantities, other_loss)
    return figure


def plot(axes: Any, records: list[dict[str, Any]], quantities: tuple[str, ...], other_loss: str) -> None:
    """One or several quantities over the epochs, those that the lines of the log have."""
    for quantity, split in itertools.product(quantities, ("train", "eval")):
        points = [(r["epoch"], r[quantity]) for r in records if r["split"] == split and is_point(r, quantity)]
        is_other = split == "train" and quantity == "loss" and other_loss
        label = f"train, with {other_loss}" if is_other else split
        style = "o-" if split == "eval" or len(points) <= FEW_POINTS else "-"
        if points:
            label = label if len(quantities) == 1 else CALLED[quantity]
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    axes.set(xlabel="epoch", ylabel=quantities[0] if len(quantities) == 1 else "")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)


def is_point(record: dict[str, Any], quantity: str) -> bool:
    """Whether a line of the log has a place on a curve: NaN is null there."""
    return all(isinstance(record.get(name), int | float) for name in ("epoch", quantity))


def confusion(counts: np.ndarray, names: tuple[str, ...]) -> matplotlib.figure.Figure:
    """Rows: the label, columns: the prediction, each row as shares of its class."""
    size = 2.5 + 0.35 * len(names) if len(names) <= 30 else 10.0
    figure = matplotlib.figure.Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, label="share of the class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="label")
    if len(names) <= 30:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    return figure


def by_accuracy(result: Evaluation) -> list[tuple[int, float]]:
    """(class, accuracy) from the best to the worst; classes without examples come last."""
    return sorted(enumerate(result.per_class().tolist()), key=lambda pair: -np.nan_to_num(pair[1], nan=-1.0))


def of_several_labels(result: MultiLabelEvaluation, names: tuple[str, ...]) -> str:
    """Average precision, F1 and positives of each class as HTML, the best first."""
    columns = ("average precision", "F1", f"images of {result.count}")
    order = np.argsort(-np.nan_to_num(result.precision, nan=-1.0), kind="stable").tolist()
    rows = [(names[k], percent(result.precision[k]), percent(result.f1[k]), str(result.positives[k])) for k in order]
    return table(rows, columns)


def percent(share: float) -> str:
    return "no examples" if np.isnan(share) else f"{100 * share:.1f} %"


def table(rows: Sequence[tuple[str, ...]], columns: tuple[str, ...] = ()) -> str:
    """A name and one or several values a row as HTML, under a line of what they are where `columns` says it."""
    head = "".join(f"<th>{html.escape(column)}" for column in ("", *columns)) if columns else ""
    cells = ("".join(f"<td class=number>{html.escape(value)}" for value in values) for _, *values in rows)
    lines = (f"<tr><th>{html.escape(name)}{line}" for (name, *_), line in zip(rows, cells, strict=True))
    return f"<table>{'<tr>' * bool(head)}{head}{''.join(lines)}</table>"


def folded(summary: str, rows: Sequence[tuple[str, ...]]) -> str:
    """A table of any number of columns, named by its first row, that opens at a click."""
    names = "".join(f"<th>{html.escape(cell)}" for cell in rows[0])
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows[1:])
    return f"<details><summary>{html.escape(summary)}</summary><table><tr>{names}{cells}</table></details>"


def picture(figure: matplotlib.figure.Figure) -> str:
    """A figure as an inline PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for it
        figure.savefig(buffer, format="png", dpi=130)
    return f"<img src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
