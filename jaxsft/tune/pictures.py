"""Figures as files, here or in a bucket."""

from __future__ import annotations

import io

import matplotlib.figure

from jaxsft import storage
from jaxsft.storage import Location


def save(figure: matplotlib.figure.Figure, path: Location) -> None:
    """Write a figure as PNG. Raises UserError where it can't be written."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    storage.write_file(path, content.getvalue())


def importances(found: dict[str, float], what: str) -> matplotlib.figure.Figure:
    """Bars, the most important on top."""
    figure = matplotlib.figure.Figure(figsize=(6, 1 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    names = list(found)[::-1]
    axes.barh(names, [found[name] for name in names])
    axes.set(xlabel=f"importance for {what}", xlim=(0, 1))
    axes.grid(alpha=0.3, axis="x")
    return figure
