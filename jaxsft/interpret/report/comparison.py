"""Several runs side by side: what each reaches, in which settings they differ, their curves, classes and answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsft.interpret.metrics import Evaluation
from jaxsft.interpret.report import charts, lines, overview, page
from jaxsft.interpret.report.lines import Points, points_of
from jaxsft.interpret.report.page import Html, Section, joined, paragraph
from jaxsft.interpret.report.reported import Reported
from jaxsft.interpret.report.tables import NONE, Cell, number, percent, table

MOST_CLASSES = 30  # in the chart and in the table of classes, those that differ most


def report(runs: Sequence[Reported]) -> bytes:
    """The page, as UTF-8."""
    names = distinct(runs)
    sections = [
        results(runs, names),
        settings(runs, names),
        curves(runs, names),
        classes(runs, names),
        agreement(runs, names),
        facts(runs, names),
        overview_of_machines(runs, names),
    ]
    title = ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) <= 4 else f"{len(names)} runs"
    header = page.joined([page.paragraph("Side by side: results, settings that differ, curves, classes.", "lead")])
    return page.document(f"{title} compared", header, sections)


def distinct(runs: Sequence[Reported]) -> list[str]:
    """What to call the runs: their names, those that share one by their place, or else by number."""
    for called in ([run.name for run in runs], [run.place for run in runs]):
        if max(Counter(called).values()) == 1:
            return called
    return [f"{run.place} ({number})" for number, run in enumerate(runs, 1)]


def results(runs: Sequence[Reported], names: Sequence[str]) -> Section:
    """The metrics, a column a run, the best of each marked."""
    metrics = [run.metrics() for run in runs]
    keys = list(dict.fromkeys(key for found in metrics for key in found))
    rows: list[list[Any]] = []
    for key in keys:
        values = [found[key][1] if key in found else math.nan for found in metrics]
        name = next(found[key][0] for found in metrics if key in found)
        form = overview.amount
        rows.append([name, *marked([form(key, v) for v in values], values, lowest=key.endswith("loss"))])
    errors = [calibration_error(run) for run in runs]
    if not all(map(math.isnan, errors)):
        rows.append(["expected calibration error", *marked([percent(e).text for e in errors], errors, lowest=True)])
    rows.append(["images a second", *(number(run.speed(), ",.0f") for run in runs)])
    seconds = [run.seconds() for run in runs]
    rows.append(["trained for", *(Cell(NONE if s is None else overview.duration(s)) for s in seconds)])
    rows.append(["parameters", *(Cell(f"{run.sizes[1]:,}") for run in runs)])
    rows.append(["of which train", *(Cell(f"{run.sizes[0]:,}") for run in runs)])
    rows.append(["images evaluated on", *(Cell(str(run.result.count) if run.result else NONE) for run in runs)])
    parts: list[str] = [table("Results; a star marks the best of a row", ("", *names), rows)]
    parts += [paragraph(f"{name}: {run.missing}", "note") for name, run in zip(names, runs) if run.missing]
    if len({evaluated_data(run) for run in runs}) > 1:
        parts.append(paragraph("The runs were not evaluated on the same images: mind that in what follows.", "note"))
    return Section("results", "Results", joined(parts))


def marked(texts: Sequence[str], values: Sequence[float], *, lowest: bool) -> list[Cell]:
    """Cells, of which the best is marked where they differ."""
    known = [value for value in values if not math.isnan(value)]
    best = (min if lowest else max)(known, default=math.nan)
    differ = len(set(known)) > 1
    return [Cell(text, "best" if differ and value == best else "") for text, value in zip(texts, values)]


def calibration_error(run: Reported) -> float:
    """The expected calibration error; NaN where there is no evaluation."""
    return math.nan if run.result is None else run.result.calibration().ece


def evaluated_data(run: Reported) -> str:
    """What tells sets of images to evaluate on apart."""
    part = run.data.get("eval")
    return f"{part.get('sha256') if isinstance(part, Mapping) else part} {run.evaluated_on}"


def settings(runs: Sequence[Reported], names: Sequence[str]) -> Section:
    """The settings in which the runs differ, a column a run."""
    flat = [flattened(run.config.to_dict()) for run in runs]
    keys = sorted({key for one in flat for key in one})
    rows = [
        [key, *(overview.shown(one[key]) if key in one else NONE for one in flat)]
        for key in keys
        if len({overview.shown(one.get(key)) for one in flat}) > 1
    ]
    if not rows:
        return Section("settings", "Settings that differ", paragraph("None: the configs are the same."))
    return Section("settings", "Settings that differ", table("Settings that differ", ("setting", *names), rows))


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their whole names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def curves(runs: Sequence[Reported], names: Sequence[str]) -> Section:
    """The curves of all runs in the same axes."""

    def of(title: str, what: str, split: str, quantity: str, share: bool = False, form: str = lines.PLAIN) -> Any:
        series = [
            Points(name, points_of(list(map(dict, run.records)), split, quantity), k, k)
            for k, (name, run) in enumerate(zip(names, runs))
        ]
        return lines.curves(title, what, series, share=share, form=form)

    several = any(run.card.multi_label for run in runs)
    found = [
        of("Loss of evaluation", "loss", "eval", "loss"),
        of("All labels right" if several else "Accuracy of evaluation", "share", "eval", "accuracy", True),
        of("mAP of evaluation", "mAP", "eval", "map", True),
        of("Loss of training", "loss", "train", "loss"),
        of("Learning rate", "rate", "train", "lr", form=".3~g"),
        of("Speed", "images a second", "train", "images_per_sec", form=",.0f"),
    ]
    shown = [charts.html(one) for one in found if one is not None]
    losses = {name: overview.training_loss(run.config, run.card.multi_label) for name, run in zip(names, runs)}
    note = "; ".join(f"{name} trains with {loss}" for name, loss in losses.items() if loss)
    parts = [
        Html(f'<div class="charts">{joined(shown)}</div>') if shown else paragraph("Nothing is logged yet.", "note")
    ]
    parts += [paragraph(f"Losses of training differ in kind: {note}.", "note")] if len(set(losses.values())) > 1 else []
    return Section("curves", "Curves", joined(parts))


def per_class(run: Reported) -> dict[str, float]:
    """A share for each class by its name: of the evaluation, or where there is none of the log's last line."""
    if run.result is not None:
        return dict(zip(run.card.names, run.result.per_class().tolist()))
    shares = run.last_evaluation.get("per_class")
    known = shares.items() if isinstance(shares, Mapping) else ()
    return {name: value for name, value in known if isinstance(value, int | float)}


def classes(runs: Sequence[Reported], names: Sequence[str]) -> Section:
    """How the classes that all runs have fare in each, those that differ most first."""
    title = "Classes"
    found = [per_class(run) for run in runs]
    common = [name for name in found[0] if all(name in one for one in found)]
    values = np.array([[one[name] for one in found] for name in common]).reshape(len(common), len(runs))
    known = ~np.isnan(values).any(1)
    common, values = [name for name, is_known in zip(common, known) if is_known], values[known]
    if not common:
        return Section("classes", title, paragraph("The runs have no class in common that was evaluated.", "note"))
    order = np.argsort(-(values.max(1) - values.min(1)), kind="stable").tolist()
    called = "average precision" if all(run.card.multi_label for run in runs) else "accuracy"
    shown = order[:MOST_CLASSES]
    left = f", the {len(shown)} of {len(common)} that differ most" if len(shown) < len(common) else ""
    series = [(name, [float(values[i, k]) for i in shown]) for k, name in enumerate(names)]
    rows = [[common[i], *map(percent, values[i].tolist()), difference(values[i, -1] - values[i, 0])] for i in order]
    columns = ("class", *names, f"{names[-1]} less {names[0]}")
    whole = table(f"{called.capitalize()} of each class", columns, rows, sortable=True)
    heading = f"{called.capitalize()} of each class, the largest difference first{left}"
    summary = f"All {len(common)} classes as a table"
    drawn = charts.dots_by_class(heading, [common[i] for i in shown], series, whole, summary)
    return Section("classes", title, charts.html(drawn))


def difference(value: float) -> Cell:
    """A difference of shares in points of percent."""
    return Cell(f"{100 * value:+.1f}")


def agreement(runs: Sequence[Reported], names: Sequence[str]) -> Section:
    """On how many of the same images two runs differ, and whether chance could do that."""
    title = "Same images"
    first, *others = list(zip(names, runs))
    rows = []
    for name, run in others:
        if (counts := both_answered(first[1], run)) is not None:
            both, only_first, only_second, neither = counts
            rows.append(
                [f"{first[0]} and {name}", *map(number, (both, only_first, only_second, neither)),
                 number(sign_test(only_first, only_second), ".2g")]
            )  # fmt: skip
    if not rows:
        note = "No two of the runs were evaluated on the same images, with one label each."
        return Section("agreement", title, paragraph(note, "note"))
    columns = ("runs", "both right", "only the first", "only the second", "neither", "p")
    note = (
        "Each image counts once. p is McNemar's exact test: how often chance alone would part the images on which only"
        " one is right at least as unevenly. It knows nothing of what another seed would give."
    )
    return Section(
        "agreement", title, joined([table("Images that each run names rightly", columns, rows), paragraph(note)])
    )


def both_answered(first: Reported, second: Reported) -> tuple[int, int, int, int] | None:
    """On how many images both, only the first, only the second and neither is right; None: they have not the same."""
    if not isinstance(first.result, Evaluation) or not isinstance(second.result, Evaluation):
        return None
    a, b = first.result.answers, second.result.answers
    one, other = np.argsort(a["example"], kind="stable"), np.argsort(b["example"], kind="stable")
    same = evaluated_data(first) == evaluated_data(second) and first.card.names == second.card.names
    if not same or not all(np.array_equal(a[key][one], b[key][other]) for key in ("example", "label")):
        return None
    right, right_too = (a["rank"] == 0)[one], (b["rank"] == 0)[other]
    pairs = ((right, right_too), (right, ~right_too), (~right, right_too), (~right, ~right_too))
    both, only_first, only_second, neither = (int((x & y).sum()) for x, y in pairs)
    return both, only_first, only_second, neither


def sign_test(one: int, other: int) -> float:
    """The two-sided p of as uneven a division of `one` + `other` between two equals: McNemar's exact test."""
    count, fewer = one + other, min(one, other)
    if not count:
        return 1.0
    # In logarithms: 2**count is no float from 1,024 on.
    half = count * math.log(2)
    logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - half for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def facts(runs: Sequence[Reported], names: Sequence[str]) -> Section:
    """The facts of each run, a column a run."""
    found = [dict(overview.summary(run)) for run in runs]
    keys = list(dict.fromkeys(key for one in found for key in one))
    rows = [[key, *(one.get(key) or NONE for one in found)] for key in keys if any(one.get(key) for one in found)]
    return Section("about", "About the runs", table("About the runs", ("", *names), rows, hidden_caption=True))


def overview_of_machines(runs: Sequence[Reported], names: Sequence[str]) -> Section:
    """Where the last start of each run computed."""
    title = "Machines and versions"
    if not any(run.starts for run in runs):
        return Section("machine", title, paragraph("They were not noted by these runs.", "note"))
    starts = [run.starts[-1] if run.starts else {} for run in runs]
    return Section("machine", title, overview.facts_of_starts(starts, names))
