"""Tables of a report: with a caption, headings of rows and columns, and numbers that line up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxsft.interpret.report.page import Html, attribute, escape

NONE = "-"  # where there is no number


class Cell(NamedTuple):
    """A number as it is shown, perhaps of a class of the style sheet."""

    text: str
    kind: str = ""


def percent(share: float | None) -> Cell:
    """A share as percent; a dash for NaN."""
    return Cell(NONE if share is None or math.isnan(share) else f"{100 * share:.1f} %")


def number(value: float | None, form: str = "") -> Cell:
    """A number; a dash for NaN."""
    return Cell(NONE if value is None or math.isnan(value) else format(value, form))


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    sortable: bool = False,
    hidden_caption: bool = False,
) -> Html:
    """A table whose first column heads its rows.

    Args:
      caption: what it is of.
      columns: their names; all empty: there is no line of them.
      rows: cells, each text, `Html` or a `Cell`.
      sortable: let a click on a column's name sort by it.
      hidden_caption: leave the caption to screen readers, where a heading above says it already.
    """
    numeric = [bool(rows) and all(isinstance(row[i], Cell) for row in rows) for i in range(len(columns))]
    head = ""
    if any(columns):
        cells = (
            f'<th scope="col"{attribute("class", "number" if numeric[i] else "")}>'
            + (f'<button type="button">{escape(name)}</button>' if sortable and name else escape(name))
            + "</th>"
            for i, name in enumerate(columns)
        )
        head = f"<thead><tr>{''.join(cells)}</tr></thead>"
    lines = "\n".join(f"<tr>{''.join(cell_html(cell, i) for i, cell in enumerate(row))}</tr>" for row in rows)
    kind = attribute("class", "sortable" if sortable else "")
    label = f"<caption{attribute('class', 'unseen' if hidden_caption else '')}>{escape(caption)}</caption>"
    return Html(
        f'<div class="scroll" tabindex="0" role="region"{attribute("aria-label", caption)}>'
        f"<table{kind}>{label}{head}<tbody>\n{lines}\n</tbody></table></div>"
    )


def cell_html(cell: Any, column: int) -> str:
    """A cell; that of the first column heads its row."""
    if column == 0:
        return f'<th scope="row">{escape(cell.text if isinstance(cell, Cell) else cell)}</th>'
    if isinstance(cell, Cell):
        return f'<td class="number{" " * bool(cell.kind)}{cell.kind}">{escape(cell.text)}</td>'
    return f"<td>{escape(cell)}</td>"


def folded(summary: str, body: Html) -> Html:
    """Something that opens at a click, or at a key."""
    return Html(f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>")


def facts(caption: str, rows: Sequence[tuple[str, Any]]) -> Html:
    """Names and values; rows without a value are left out."""
    return table(caption, ("", ""), [row for row in rows if row[1]], hidden_caption=True)
