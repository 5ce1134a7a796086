"""The frame of a report: one HTML file that needs nothing else, in which no name can become markup or script.

The charts are drawn by Plotly's basic bundle (scatter, bars), which lies beside this file as it is published. Vega-Lite
with all that it needs is smaller, 0.83 against 1.19 MB, but builds its functions from text, so that the page would have
to allow `eval`; its interpreter, which does not, is another library and is slower. Of Plotly what the basic bundle
lacks, a heat map, is better a table: screen readers read it and the keyboard walks through it.

Everything that is said of a run is data of strangers: class names, file names, values of settings. `escape` makes text
of all that is not `Html` already, data for scripts lie in JSON blocks without a `<`, and the page's policy lets no
script run but these two, by their hashes, and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.cli import printable

PLOTLY_VERSION = "4.1.1"  # of plotly.js-basic-dist-min as npm has it, MIT; its licence: plotly-LICENSE.txt
PLOTLY_SHA256 = "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"
FOLDER = Path(__file__).parent
LIBRARY, SCRIPT, STYLE = "plotly-basic.min.js", "report.js", "style.css"
DIGITS = 6  # of a number in a chart


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


class Section(NamedTuple):
    """A part of the page with a heading, named in its contents."""

    anchor: str
    title: str
    body: Html


def escape(text: object) -> Html:
    """`text` as HTML that shows it: markup, control characters and bytes that are no UTF-8 are seen, not obeyed."""
    return text if isinstance(text, Html) else Html(html.escape(printable(text)))


def joined(parts: Iterable[str]) -> Html:
    """Pieces of HTML, one a line; what is no `Html` is escaped."""
    return Html("\n".join(map(escape, parts)))


def paragraph(text: str, kind: str = "") -> Html:
    """A paragraph, perhaps of a class of the style sheet."""
    return Html(f"<p{attribute('class', kind)}>{escape(text)}</p>")


def attribute(name: str, value: str) -> Html:
    """` name="value"`, or nothing where there is no value."""
    return Html(f' {name}="{escape(value)}"') if value else Html("")


def json_block(value: Any, kind: str) -> Html:
    """Data for the script as a block of JSON: no text in it can end the block, for `<`, `>` and `&` are escapes."""
    text = json.dumps(rounded(value), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" class="{kind}">{text}</script>')


def rounded(value: Any) -> Any:
    """`value` with floats of DIGITS digits, and None for those that JSON has not."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def document(title: str, header: Html, sections: Sequence[Section]) -> bytes:
    """The page: `header` under the title, a table of contents, the sections.

    The title stands in the first heading too.
    """
    style, script, library = (asset(name) for name in (STYLE, SCRIPT, LIBRARY))
    allowed = " ".join(f"'sha256-{digest(code)}'" for code in (library, script))
    nothing = "default-src 'none'; form-action 'none'; base-uri 'none'"
    policy = f"{nothing}; img-src data: blob:; style-src 'unsafe-inline'; script-src {allowed}"
    contents = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in sections)
    bodies = "\n".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title">\n'
        f'<h2 id="{s.anchor}-title">{escape(s.title)}</h2>\n{s.body}\n</section>'
        for s in sections
    )
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="jaxsft">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header class="top">
<h1>{escape(title)}</h1>
{header}
</header>
<div class="frame">
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main id="content" tabindex="-1">
<noscript><p class="note">Charts need JavaScript. Their numbers are in the tables below each.</p></noscript>
{bodies}
</main>
</div>
<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""
    return text.encode(errors="backslashreplace")


def asset(name: str) -> str:
    """A file that travels with this package."""
    return (FOLDER / name).read_text(encoding="utf-8")


def digest(code: str) -> str:
    """The sha256 of a script as a policy names it."""
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
