"""Curves over the epochs, as charts: from the lines of a log to what is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsft.interpret.report.charts import COLOURS, DASHES, MARKERS, SHARE, Chart, label
from jaxsft.interpret.report.page import Html
from jaxsft.interpret.report.tables import number, percent, table

MOST_POINTS, MOST_ROWS = 500, 100  # of a curve; of its table
FEW_POINTS = 40  # of a curve: each is marked, so that a single one is seen, too
PLAIN = ".4~f"  # d3's format of a number


class Points(NamedTuple):
    """A curve: what it is called, and (epoch, step, value) of each of its points."""

    name: str
    points: list[tuple[float, int, float]]
    colour: int = 0
    dash: int = 0


def thinned(points: Sequence[Any], most: int) -> list[Any]:
    """Up to `most` of the points, evenly spaced, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i)] for i in np.linspace(0, len(points) - 1, most)]


def points_of(records: Sequence[dict[str, Any]], split: str, quantity: str) -> list[tuple[float, int, float]]:
    """(epoch, step, value) of a quantity in the lines of the log that have it; NaN is null there."""
    wanted = [record for record in records if record.get("split") == split and is_point(record, quantity)]
    return [(record["epoch"], record["step"], record[quantity]) for record in wanted]


def is_point(record: dict[str, Any], quantity: str) -> bool:
    """Whether a line of the log has a place on a curve."""
    values = (record.get(name) for name in ("epoch", quantity))
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def curves(title: str, what: str, series: Sequence[Points], *, share: bool = False, form: str = PLAIN) -> Chart | None:
    """Quantities over the epochs; None where no series has a point.

    Args:
      title: of the chart.
      what: the vertical axis is.
      series: the curves.
      share: whether they are shares of 1, shown as percent.
      form: d3's format of other values.
    """
    series = [one for one in series if one.points]
    if not series:
        return None
    form = SHARE if share else form
    traces = [curve(one, form) for one in series]
    layout = {
        "xaxis": {"title": {"text": "epoch"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": what}, **around(series, share), **({"tickformat": ".0%"} if share else {})},
        "hovermode": "x unified",
    }
    ends = ", ".join(f"{one.name} {said(one.points[-1][2], share)}" for one in series)
    return Chart(
        title, f"{title} over the epochs; at the end {ends}", traces, layout, curve_table(title, series, share)
    )


def around(series: Sequence[Points], share: bool) -> dict[str, Any]:
    """A range for curves that are all one constant, which Plotly would show in the middle of -1 .. 1; else none."""
    values = {value for one in series for _, _, value in one.points}
    if len(values) > 1:
        return {}
    (value,) = values
    ends = sorted((0, 2 * value or 1))
    return {"range": [ends[0], min(ends[1], 1.02) if share else ends[1]]}


def said(value: float, share: bool) -> str:
    """A value for people."""
    return f"{100 * value:.1f} %" if share else f"{value:.4g}"


def curve(one: Points, form: str) -> dict[str, Any]:
    """A curve as Plotly's trace."""
    points = thinned(one.points, MOST_POINTS)
    epochs, steps, values = (list(column) for column in zip(*points, strict=True))
    colour = f"series-{one.colour % COLOURS}"
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(points) <= FEW_POINTS else "lines",
        "name": label(one.name),
        "x": epochs,
        "y": values,
        "customdata": steps,
        "line": {"color": colour, "dash": DASHES[one.dash % len(DASHES)], "width": 2},
        "marker": {"color": colour, "symbol": MARKERS[one.dash % len(MARKERS)], "size": 7},
        "hovertemplate": f"%{{y:{form}}}, step %{{customdata}}",
    }


def curve_table(title: str, series: Sequence[Points], share: bool) -> Html:
    """The numbers of curves, a row a step."""
    by_step: dict[int, tuple[float, dict[str, float]]] = {}
    for one in series:
        for epoch, step, value in one.points:
            by_step.setdefault(step, (epoch, {}))[1][one.name] = value
    steps = thinned(sorted(by_step), MOST_ROWS)
    left = f" ({len(steps)} of {len(by_step)} steps)" if len(steps) < len(by_step) else ""
    form = percent if share else lambda value: number(value, ".4g")
    rows = [
        [str(step), number(by_step[step][0], ".4g"), *(form(by_step[step][1].get(one.name)) for one in series)]
        for step in steps
    ]
    return table(title + left, ("step", "epoch", *(one.name for one in series)), rows, hidden_caption=not left)
