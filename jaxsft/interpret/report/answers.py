"""What a model answers: confusions, the worst and the least certain answers in pictures, classes, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsft.interpret.metrics import Evaluation
from jaxsft.interpret.mistakes import Mistake
from jaxsft.interpret.multilabel import MultiLabelEvaluation
from jaxsft.interpret.report import charts
from jaxsft.interpret.report.page import Html, Section, escape, joined, paragraph
from jaxsft.interpret.report.pictures import gallery
from jaxsft.interpret.report.reported import Reported
from jaxsft.interpret.report.tables import number, percent, table

MOST_IN_MATRIX = 100  # classes; beyond that it is a grey square
MOST_PAIRS, MOST_BARS = 12, 40


def confusions(run: Reported) -> Section:
    """Which classes are taken for which."""
    result, names = run.result, run.card.names
    title = "Confusions"
    if not isinstance(result, Evaluation):
        return Section("confusions", title, paragraph(run.missing or "There is no evaluation yet.", "note"))
    pairs = [
        (f"{names[label]} taken for {names[predicted]}", number(count), percent(count / max(support, 1)))
        for label, predicted, count in result.confused(MOST_PAIRS)
        for support in (int(result.classes.support[label]),)
    ]
    columns = ("confusion", "examples", "of the label")
    listed = table("The most frequent confusions", columns, pairs) if pairs else paragraph("None.")
    if run.card.num_classes > MOST_IN_MATRIX:
        note = f"A matrix of {run.card.num_classes} classes could not be read; these are its largest entries."
        return Section("confusions", title, joined([paragraph(note), listed]))
    drawn = charts.matrix(result.confusion, names)
    return Section("confusions", title, Html(f'<div class="beside">{drawn}<div>{listed}</div></div>'))


def worst(run: Reported) -> Section:
    """The mistakes that the model is surest of."""
    note = (
        "Wrong, and sure of it: the most probable of the wrong answers. Here are also the images whose label is wrong,"
        " so look at the label first."
    )
    return Section("worst", "Worst mistakes", joined([paragraph(note), gallery(run.wrong, taken, in_words)]))


def unsure(run: Reported) -> Section:
    """The answers that the model is least sure of."""
    what = "the decision nearest to one half" if run.card.multi_label else "the lowest probability of the prediction"
    note = f"Right or wrong, the model hardly knows: {what}. Images like these are worth labelling and adding."
    return Section("unsure", "Most uncertain", joined([paragraph(note), gallery(run.unsure, doubted, in_words)]))


def augmented(run: Reported) -> Section:
    """Training images as the model sees them."""
    note = "Images of the first batch after augmentation, before mixing: what the model is trained on."
    body = gallery(
        run.augmented, lambda one: Html(f"<b>{escape(one.label)}</b>"), lambda one: f"{one.label}, augmented"
    )
    return Section("inputs", "Augmented inputs", joined([paragraph(note), body]))


def taken(one: Mistake) -> Html:
    """What a picture is, and what it is taken for."""
    return Html(
        f"<b>{escape(one.label)}</b> <span>taken for</span> <b>{escape(one.predicted)}</b>"
        f'<br><span class="probability">{one.probability:.2f}</span>'
    )


def doubted(one: Mistake) -> Html:
    """As `taken`, or that it is right."""
    if one.label != one.predicted:
        return taken(one)
    return Html(
        f'<b>{escape(one.label)}</b> <span>right</span><br><span class="probability">{one.probability:.2f}</span>'
    )


def in_words(one: Mistake) -> str:
    """A picture for those who can't see it."""
    answer = "rightly named" if one.label == one.predicted else f"taken for {one.predicted}"
    return f"{one.label}, {answer} with probability {one.probability:.2f}, {one.file}"


def by_class(run: Reported) -> Section:
    """How each class fares, the worst first."""
    names, result = run.card.names, run.result
    if result is None:
        return Section("classes", "Classes", logged(run))
    rows: list[Sequence[Any]]
    columns: tuple[str, ...]
    if isinstance(result, MultiLabelEvaluation):
        called = ("average precision", "F1")
        bars, dots, support = result.precision, result.f1, result.positives
        rows = [
            (names[k], percent(float(bars[k])), percent(float(dots[k])), number(int(support[k])))
            for k in worst_first(bars)
        ]
        columns = ("class", *called, f"images of {result.count}")
    else:
        called = ("recall", "precision")
        found = result.per_class_table()
        bars, dots, support = (np.array([getattr(r, n) for r in found]) for n in (*called, "support"))
        rows = [
            (names[k], percent(r.precision), percent(r.recall), percent(r.f1), number(r.support))
            for k, r in ((k, found[k]) for k in worst_first(bars))
        ]
        columns = ("class", "precision", "recall, its accuracy", "F1", "images")
    whole = table("All classes, the worst first", columns, rows, sortable=True)
    summary = f"All {len(names)} classes as a table"
    order = [k for k in worst_first(bars) if not np.isnan(bars[k])][:MOST_BARS]
    if not order:
        return Section("classes", "Classes", whole)
    left = f", the {MOST_BARS} worst of {len(names)}" if len(names) > MOST_BARS else ""
    title = f"{called[0].capitalize()} and {called[1]} of each class{left}"
    said, shown = [f"{support[k]} images" for k in order], [names[k] for k in order]
    pairs = (called[0], bars[order]), (called[1], dots[order])
    return Section("classes", "Classes", charts.html(charts.bars_by_class(title, shown, *pairs, said, whole, summary)))


def worst_first(values: np.ndarray) -> list[int]:
    """The classes from the lowest value to the highest, those without one last."""
    return np.argsort(np.where(np.isnan(values), np.inf, values), kind="stable").tolist()


def logged(run: Reported) -> Html:
    """What the log's last line says of each class, where there is no evaluation."""
    shares = run.last_evaluation.get("per_class") or {}
    if not isinstance(shares, dict) or not shares:
        return paragraph(run.missing or "There is no evaluation yet.", "note")
    called = "average precision" if run.card.multi_label else "accuracy"
    known = sorted(shares.items(), key=lambda pair: np.inf if pair[1] is None else pair[1])
    rows = [(name, percent(value)) for name, value in known]
    return joined([paragraph(run.missing, "note"), table("At the end of training", ("class", called), rows)])


def calibration(run: Reported) -> Section:
    """Whether the probabilities mean what they say."""
    title, result = "Calibration", run.result
    if result is None:
        return Section("calibration", title, paragraph(run.missing or "There is no evaluation yet.", "note"))
    found = result.calibration()
    if not found.counts.any():
        return Section("calibration", title, paragraph("The network computes no numbers.", "note"))
    said = [f"Expected calibration error {100 * found.ece:.1f} %, the largest of a bin {100 * found.mce:.1f} %."]
    if run.card.temperature != 1:
        said.append(f"Logits are divided by the temperature {run.card.temperature:.4g}.")
    drawn = [charts.reliability(found, "labelled so" if run.card.multi_label else "right")]
    if isinstance(result, Evaluation):
        probability, right = result.answers["probability"], result.answers["rank"] == 0
        known = ~np.isnan(probability)
        shares = [f"{100 * float(values[known].mean()):.1f} %" for values in (probability, right)]
        said.append(f"The mean probability is {shares[0]}, and {shares[1]} are right.")
        drawn.append(charts.confidences(probability[known], right[known]))
    body = Html(f'<div class="charts">{joined(map(charts.html, drawn))}</div>')
    return Section("calibration", title, joined([paragraph(" ".join(said)), body]))
