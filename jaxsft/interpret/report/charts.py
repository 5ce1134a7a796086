"""Charts as data: pure functions from numbers to what Plotly draws, and to the table that says the same.

A colour is named, such as `series-0`, and the script takes it from the style sheet: charts follow light and dark. Every
series has a colour of Okabe and Ito's, which people who see few colours tell apart, and also a dash and a marker of its
own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsft.cli import printable
from jaxsft.interpret.calibration import Calibration
from jaxsft.interpret.report.page import Html, attribute, escape, json_block
from jaxsft.interpret.report.tables import folded, number, percent, table

COLOURS = 7  # of series in the style sheet, --series-0 and so on
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star")
LONG_NAME = 24  # letters of a class on an axis
SHARE = ".1%"  # d3's format


class Chart(NamedTuple):
    """A chart, and the same for those who can't see it."""

    title: str
    said: str  # what there is to see, in a sentence
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    numbers: Html
    height: int = 300  # px
    summary: str = "Numbers"  # of `numbers`, which are folded


def html(chart: Chart) -> Html:
    """A chart as a figure, with its numbers below it."""
    block = json_block({"traces": chart.traces, "layout": chart.layout}, "spec")
    plot = f'<div class="plot" style="height:{chart.height}px"{attribute("data-said", chart.said)}></div>'
    return Html(
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>\n{plot}\n{block}\n'
        f"{folded(chart.summary, chart.numbers)}</figure>"
    )


def label(name: object) -> str:
    """A name for Plotly, which takes a little HTML in its texts."""
    return printable(name).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def short(name: object) -> str:
    """A name for an axis."""
    text = printable(name)
    return label(text if len(text) <= LONG_NAME else text[: LONG_NAME - 1] + "…")


def bars_by_class(
    title: str,
    names: Sequence[str],
    bars: tuple[str, np.ndarray],
    dots: tuple[str, np.ndarray],
    said: Sequence[str],
    numbers: Html,
    summary: str,
) -> Chart:
    """A bar and a dot for each class, in their order from the top.

    Args:
      title: of the chart.
      names: of the classes.
      bars: what they are, and values in 0 .. 1, float [n].
      dots: likewise.
      said: of each class, what else there is to say of it.
      numbers: a table of them, and its `summary`.
      summary: see there.
    """
    rows = list(range(len(names)))
    texts = [f"{label(name)}<br>{label(more)}" for name, more in zip(names, said, strict=True)]
    shared = {"y": rows, "text": texts, "textposition": "none"}
    traces = [
        {
            "type": "bar", "orientation": "h", "name": bars[0], "x": bars[1].tolist(), **shared,
            "marker": {"color": "series-0"}, "hovertemplate": f"%{{text}}<br>{bars[0]} %{{x:{SHARE}}}<extra></extra>",
        },
        {
            "type": "scatter", "mode": "markers", "name": dots[0], "x": dots[1].tolist(), "y": rows, "text": texts,
            "marker": {
                "color": "series-1", "symbol": "diamond", "size": 9, "line": {"color": "surface", "width": 1}
            },
            "hovertemplate": f"%{{text}}<br>{dots[0]} %{{x:{SHARE}}}<extra></extra>",
        },
    ]  # fmt: skip
    layout = {
        "xaxis": {"range": [0, 1.02], "tickformat": ".0%", "fixedrange": True},
        "yaxis": {"tickvals": rows, "ticktext": list(map(short, names)), "range": [len(names) - 0.4, -0.6],
                  "ticksuffix": " ", "fixedrange": True, "showgrid": False, "zeroline": False},
        "hovermode": "closest",
        "bargap": 0.35,
    }  # fmt: skip
    sentence = f"{title}: a bar for {bars[0]} and a diamond for {dots[0]} of each class"
    return Chart(title, sentence, traces, layout, numbers, 60 + 22 * len(names), summary)


def reliability(found: Calibration, what: str) -> Chart:
    """How often a probability is right, against what it says.

    Args:
      found: the curve.
      what: the share of each bin is of, such as 'right'.
    """
    full = np.flatnonzero(found.counts > 0)
    low, high = found.edges[:-1][full], found.edges[1:][full]
    said = [
        f"{round(share * count)} of {count} {what}, mean probability {100 * mean:.1f} %"
        for share, count, mean in zip(found.accuracy[full], found.counts[full].tolist(), found.confidence[full])
    ]
    ranges = [f"{a:.2f} to {b:.2f}" for a, b in zip(low, high)]
    traces = [
        {
            "type": "bar", "name": f"share that is {what}", "x": ((low + high) / 2).tolist(),
            "y": found.accuracy[full].tolist(), "width": (high - low).tolist(),
            "text": [f"probability {a}<br>{b}" for a, b in zip(ranges, said)], "textposition": "none",
            "marker": {"color": "series-0", "line": {"color": "surface", "width": 1}},
            "hovertemplate": "%{text}<extra></extra>",
        },
        {
            "type": "scatter", "mode": "lines", "name": "as it should be", "x": [0, 1], "y": [0, 1],
            "line": {"color": "series-1", "dash": "dash", "width": 2}, "hoverinfo": "skip",
        },
    ]  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "probability"}, "range": [0, 1], "tickformat": ".0%"},
        "yaxis": {"title": {"text": f"share {what}"}, "range": [0, 1.02], "tickformat": ".0%"},
        "hovermode": "closest",
    }
    rows = [
        [interval, number(count), percent(mean), percent(share)]
        for interval, count, mean, share in zip(
            ranges, found.counts[full].tolist(), found.confidence[full].tolist(), found.accuracy[full].tolist()
        )
    ]
    title = "Reliability"
    body = table(title, ("probability", "count", "mean probability", what), rows, hidden_caption=True)
    return Chart(title, f"The share that is {what} against the probability given, in bins", traces, layout, body)


def confidences(confidence: np.ndarray, correct: np.ndarray, bins: int = 20) -> Chart:
    """How many examples have which probability, those that are right on those that are wrong."""
    edges = np.linspace(0, 1, bins + 1)
    counts = {
        "wrong": np.histogram(confidence[~correct], edges)[0],
        "right": np.histogram(confidence[correct], edges)[0],
    }
    middle, ranges = (edges[:-1] + edges[1:]) / 2, [f"{a:.2f} to {b:.2f}" for a, b in itertools.pairwise(edges)]
    looks = {
        "wrong": {
            "color": "series-1",
            "pattern": {"shape": "/", "fillmode": "overlay", "fgcolor": "surface", "size": 6},
        }
    }
    traces = [
        {
            "type": "bar", "name": name, "x": middle.tolist(), "y": values.tolist(), "text": ranges,
            "textposition": "none", "marker": looks.get(name, {"color": "series-0"}),
            "hovertemplate": f"probability %{{text}}<br>%{{y}} {name}<extra></extra>",
        }
        for name, values in counts.items()
    ]  # fmt: skip
    layout = {
        "barmode": "stack",
        "bargap": 0.08,
        "xaxis": {"title": {"text": "probability of the prediction"}, "range": [0, 1], "tickformat": ".0%"},
        "yaxis": {"title": {"text": "examples"}},
        "hovermode": "closest",
    }
    rows = [
        [interval, number(int(right)), number(int(wrong))]
        for interval, right, wrong in zip(ranges, counts["right"], counts["wrong"])
        if right + wrong
    ]
    title = "Confidence"
    body = table(title, ("probability", "right", "wrong"), rows, hidden_caption=True)
    return Chart(title, "How many examples have which probability, right and wrong", traces, layout, body)


def dots_by_class(
    title: str, names: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], numbers: Html, summary: str
) -> Chart:
    """A dot for each class and series, in the order of the classes from the top, and a line between those of a class.

    Args:
      title: of the chart.
      names: of the classes.
      series: what each is called, and a share in 0 .. 1 of each class.
      numbers: a table of them, and its `summary`.
      summary: see there.
    """
    rows = list(range(len(names)))
    texts = [label(name) for name in names]
    traces = [
        {
            "type": "scatter", "mode": "markers", "name": label(name), "y": rows, "text": texts,
            "x": list(values),
            "marker": {"color": f"series-{k % COLOURS}", "symbol": MARKERS[k % len(MARKERS)], "size": 10},
            "hovertemplate": f"%{{text}}<br>%{{fullData.name}} %{{x:{SHARE}}}<extra></extra>",
        }
        for k, (name, values) in enumerate(series)
    ]  # fmt: skip
    layout = {
        "xaxis": {"range": [-0.02, 1.02], "tickformat": ".0%", "fixedrange": True},
        "yaxis": {"tickvals": rows, "ticktext": list(map(short, names)), "range": [len(names) - 0.4, -0.6],
                  "ticksuffix": " ", "fixedrange": True, "zeroline": False},
        "hovermode": "closest",
    }  # fmt: skip
    ends = [[min(column), max(column), None] for column in zip(*(values for _, values in series), strict=True)]
    between = {
        "type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False,
        "x": list(itertools.chain(*ends)), "y": [row for row in rows for _ in range(3)],
        "line": {"color": "line", "width": 4},
    }  # fmt: skip
    said = f"{title}: a dot for each class and run"
    return Chart(title, said, [between, *traces], layout, numbers, 60 + 22 * len(names), summary)


def matrix(counts: np.ndarray, names: Sequence[str]) -> Html:
    """A confusion matrix as a table that the script fills: rows are the labels, columns the predictions.

    Args:
      counts: int [K, K].
      names: of the classes.
    """
    rows, columns = np.nonzero(counts)
    entries = [rows.tolist(), columns.tolist(), counts[rows, columns].tolist()]
    block = json_block({"names": list(map(printable, names)), "entries": entries}, "spec")
    return Html(
        '<figure class="confusion"><figcaption>A row for each label, a column for each prediction; the stronger the'
        ' colour, the larger the share of the label. <span class="key right">right</span> <span class="key'
        ' wrong">wrong</span>'
        ' <span class="by-key">With the arrow keys one walks from cell to cell.</span></figcaption>\n'
        '<p class="readout" role="status">&nbsp;</p>\n<div class="scroll grid-scroll"></div>\n'
        f"{block}</figure>"
    )
