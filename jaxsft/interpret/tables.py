"""What is said of an evaluation beyond its summary: as JSON, and as lines for people."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsft.cli import printable
from jaxsft.data.base import Source
from jaxsft.data.classes import said
from jaxsft.interpret.bootstrap import LEVEL, Interval
from jaxsft.interpret.metrics import UNRANKED, Evaluation
from jaxsft.interpret.multilabel import Result
from jaxsft.interpret.per_class import Row

WHOLE, PART = 20, 5  # classes: up to so many all are shown, of more as many of the best and of the worst
CONFUSED, IN_RECORD = 5, 100  # pairs that are shown, and that are written
LONGEST = 24  # letters of a class's name in a table
TITLES = {
    "accuracy": "accuracy", "top5": "top-5", "loss": "loss", "f1_micro": "micro F1", "f1_macro": "macro F1",
    "ece": "ECE",
}  # fmt: skip


def averages_of(result: Result) -> dict[str, dict[str, float]]:
    """The averages that say something: of one label an image the micro average is the accuracy."""
    names = ("macro", "weighted") if isinstance(result, Evaluation) else ("macro", "weighted", "micro")
    return {name: result.average(name) for name in names}


def details(result: Result, names: Sequence[str], found: Mapping[str, Interval], resamples: int) -> dict[str, Any]:
    """As JSON what `record` has not.

    Args:
      result: the evaluation.
      names: of the classes.
      found: its intervals, by name; {}: none.
      resamples: that they were made of.

    Returns:
      "classes": a list of class, precision, recall, f1, support; "averages": the same of macro, weighted (and micro);
      "confused": a list of label, predicted, count, of one label an image; "calibration": `Calibration`'s fields, nll
      and brier; "intervals": level, resamples, and [low, high] of each name.
    """
    rows = [{"class": names[row.label], **row._asdict()} for row in result.per_class_table()]
    confused = {}
    if isinstance(result, Evaluation):
        pairs = result.confused(IN_RECORD)
        confused["confused"] = [{"label": names[a], "predicted": names[b], "count": count} for a, b, count in pairs]
    intervals = {"level": LEVEL, "resamples": resamples, **{name: list(edges) for name, edges in found.items()}}
    return {
        "classes": [{name: value for name, value in row.items() if name != "label"} for row in rows],
        "averages": averages_of(result),
        **confused,
        "calibration": {**result.calibration().record(), "nll": result.nll, "brier": result.brier},
        **({"intervals": intervals} if found else {}),
    }


def lines(result: Result, names: Sequence[str], found: Mapping[str, Interval], resamples: int) -> list[str]:
    """The same for people, a compact table."""
    shown = []
    if found:
        edges = ", ".join(f"{TITLES[name]} {low:.4f} to {high:.4f}" for name, (low, high) in found.items())
        shown.append(f"{LEVEL:.0%} intervals of {resamples} resamples: {edges}")
    shown += table_of(result, names)
    if isinstance(result, Evaluation) and (pairs := result.confused(CONFUSED)):
        told = ", ".join(f"{name_in(names, a)} for {name_in(names, b)} {count}" for a, b, count in pairs)
        shown.append(f"most often taken: {told}")
    curve = result.calibration()
    errors = f"ECE {curve.ece:.4f}, MCE {curve.mce:.4f}, NLL {result.nll:.4f}, Brier {result.brier:.4f}"
    return [*shown, f"calibration: {errors}"]


def table_of(result: Result, names: Sequence[str]) -> list[str]:
    """Precision, recall, F1 and support: of all classes, or of many of the best and the worst by F1."""
    rows = result.per_class_table()
    parts: list[tuple[str, list[Row]]] = [("class", rows)]
    if len(rows) > WHOLE:
        ranked = sorted((row for row in rows if not np.isnan(row.f1)), key=lambda row: -row.f1)
        parts = [(f"best of {len(rows)}", ranked[:PART]), (f"worst of {len(rows)}", ranked[-PART:])]
    averages = averages_of(result)
    labels = [name_in(names, row.label) for _, part in parts for row in part]
    width = max(map(len, [*labels, *averages, *(title for title, _ in parts)]))
    shown = []
    for title, part in parts:
        shown.append(f"{title:{width}}  {'precision':>9}  {'recall':>6}  {'F1':>6}  {'support':>7}")
        for row in part:
            shares = line_of(name_in(names, row.label), width, row.precision, row.recall, row.f1)
            shown.append(f"{shares}  {row.support:>7}")
    return [*shown, *(line_of(name, width, *mean.values()) for name, mean in averages.items())]


def line_of(name: str, width: int, precision: float, recall: float, f1: float) -> str:
    """A row of the table; '-' for what is no number."""
    cells = ("-" if np.isnan(value) else f"{value:.4f}" for value in (precision, recall, f1))
    return "  ".join(f"{cell:>{size}}" for cell, size in zip((f"{name:{width}}", *cells), (width, 9, 6, 6)))


def name_in(names: Sequence[str], number: int) -> str:
    """The name of a class, cut where it is long."""
    name = printable(names[number])
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def losses_of(result: Result, source: Source, names: Sequence[str], most: int) -> list[dict[str, Any]]:
    """The examples of the largest loss: "file", "label", "predicted", "probability" and "loss" of each.

    A row with a NaN has no "predicted".
    """
    answers, found = result.answers, []
    for row in result.top_losses(most).tolist():
        predicted = answers["predicted"][row]
        known = np.ndim(predicted) > 0 or predicted != UNRANKED
        found.append(
            {
                "file": source.name(int(answers["example"][row])),
                "label": said(answers["label"][row], names),
                "predicted": said(predicted, names) if known else None,
                "probability": float(answers["probability"][row]),
                "loss": float(answers["loss"][row]),
            }
        )
    return found


def line_of_loss(entry: Mapping[str, Any]) -> str:
    """One of `losses_of` for people."""
    taken = f"taken for {entry['predicted']} ({entry['probability']:.2f})" if entry["predicted"] else "no numbers"
    return f"  {entry['loss']:.4f}  {entry['file']}: {entry['label']}, {taken}"


def as_html(result: Result) -> str:
    """The summary and the table, for a notebook."""
    names = result.class_names or tuple(map(str, range(result.num_classes)))
    text = "\n".join([result.summary(), *lines(result, names, {}, 0)])
    return f"<pre>{html.escape(text)}</pre>"
