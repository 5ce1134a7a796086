"""Explanations of what a model sees on pictures: as values, as overlays, as a picture of many, and as HTML."""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import matplotlib
import matplotlib.figure
import numpy as np
import PIL.Image

from jaxsft.cli import printable
from jaxsft.interpret.overlay import AGAINST, FOR, enlarged, overlay, stretched

# method -> what to call it, for people
METHODS: Mapping[str, str] = MappingProxyType(
    {
        "gradcam": "Grad-CAM",
        "gradcam++": "Grad-CAM++",
        "integrated_gradients": "Integrated gradients",
        "occlusion": "Occlusion",
    }
)
SIGNED = ("integrated_gradients", "occlusion")  # whose values speak for a class or against it
ROWS = 6  # pictures of an overview at most
CELL, DPI = 1.4, 92  # inches of one of its pictures, and dots in one of them


class Completeness(NamedTuple):
    """What integrated gradients add up to, and what they should."""

    total: float  # the sum of all attributions
    change: float  # the logit for the image minus that for the baseline

    @property
    def error(self) -> float:
        """The difference: captum's convergence delta."""
        return self.total - self.change


class Explanation(NamedTuple):
    """What on one picture speaks for one class, by one method."""

    method: str  # of METHODS
    class_name: str
    probability: float  # of the class
    logit: float
    values: np.ndarray  # float32 [S, S]: Grad-CAM's in 0..1; attributions, summed over the channels, of any size
    layer: str = ""  # torch's name of the one whose map was taken, where there is one
    completeness: Completeness | None = None

    @property
    def signed(self) -> bool:
        """Whether values below 0 speak against the class."""
        return self.method in SIGNED

    def over(self, image: np.ndarray) -> np.ndarray:
        """The values over their picture uint8 [S, S, 3], as one."""
        return overlay(image, stretched(self.values) if self.signed else self.values, self.signed)

    def said(self) -> str:
        """What was asked and how it was answered, in a line."""
        return f"{METHODS[self.method]} of {self.class_name}, {self.details()}"

    def details(self) -> str:
        """How likely the class is, where the map comes from, what attributions add up to."""
        parts = [f"probability {self.probability:.3f}"]
        parts += [f"map of {self.layer}"] if self.layer else []
        if self.completeness:
            total, change = self.completeness
            parts.append(f"attributions sum to {total:.4f}, the logit changes by {change:.4f}")
        return "; ".join(parts)


class Explained(NamedTuple):
    """A picture and what was found on it."""

    file: str  # or 'image 3', its place, where it has none
    image: np.ndarray  # uint8 [S, S, 3], what the model sees of it
    best: tuple[tuple[str, float], ...]  # the most probable classes and their probabilities
    explanations: tuple[Explanation, ...]


class Explanations(tuple[Explained, ...]):
    """Explained pictures; a notebook shows them."""

    def _repr_html_(self) -> str:
        """What IPython displays."""
        sections = "".join(section(one, encoded(one)) for one in self)
        return f"<style>{SCOPED}</style><div class=jaxsft-explain>{LEGEND}{sections}</div>"


def png(picture: PIL.Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def gradient(colours: Iterable[Sequence[int]]) -> str:
    """Colours from left to right, in CSS."""
    return f"linear-gradient(to right, {', '.join('rgb({}, {}, {})'.format(*colour) for colour in colours)})"


VIRIDIS = [tuple(round(255 * part) for part in matplotlib.colormaps["viridis"](i / 8)[:3]) for i in range(9)]
LEGEND = f"""<p class=legend><span>Grad-CAM: nothing <i style="background:{gradient(VIRIDIS)}"></i> most</span>
<span>attributions: against <i style="background:{gradient((AGAINST, (235, 235, 235), FOR))}"></i> for the class</span>
</p>"""
SCOPED = """
.jaxsft-explain { overflow-wrap: anywhere }
.jaxsft-explain section { margin: 1.5rem 0 } .jaxsft-explain img { width: 100%; display: block }
.jaxsft-explain .row { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(9.2rem, 1fr)) }
@media (min-width: 60rem) { .jaxsft-explain .row { grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)) } }
.jaxsft-explain figure { margin: 0; max-width: 18rem }
.jaxsft-explain figcaption { font-size: .85em; line-height: 1.35; margin-top: .3rem }
.jaxsft-explain .legend { display: flex; flex-wrap: wrap; gap: .3rem 2rem; font-size: .85em; margin: .5rem 0 }
.jaxsft-explain .legend i { display: inline-block; width: 7rem; height: .8em; vertical-align: -.05em }
.jaxsft-explain h2 { font-size: 1.05rem; margin: 0 0 .2rem }
.jaxsft-explain .best { margin: 0 0 .6rem }
"""
STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ccc }
@media (prefers-color-scheme: dark) { :root { --text: #e4e4e4; --page: #16181c; --line: #444 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 75rem; color: var(--text);
  background: var(--page) }
h1 { font-size: 1.4rem } dl { display: grid; gap: .1rem 1rem;
  grid-template-columns: fit-content(45%) 1fr } dt { opacity: .8 } dd { margin: 0 }
section { border-top: 1px solid var(--line); padding-top: 1rem }
"""


def head(title: str, facts: Sequence[tuple[str, str]]) -> str:
    """The beginning of a sheet as HTML: what was asked of which model. Sections and `FOOT` follow."""
    title = html.escape(printable(title))
    rows = "".join(f"<dt>{html.escape(name)}<dd>{html.escape(printable(value))}" for name, value in facts)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<meta name=viewport content='width=device-width, initial-scale=1'><style>{STYLE}{SCOPED}</style>"
        f"<body><main class=jaxsft-explain><h1>{title}</h1><dl>{rows}</dl>{LEGEND}\n"
    )


FOOT = "</main></body></html>\n"


def encoded(one: Explained) -> list[bytes]:
    """The picture, and an overlay of each explanation, as the contents of PNG files."""
    return [png(enlarged(image)) for image in (one.image, *(each.over(one.image) for each in one.explanations))]


def section(one: Explained, pictures: Sequence[bytes]) -> str:
    """A picture and its explanations as HTML, the pictures inside, as `encoded` gives them."""
    best = ", ".join(f"{name} {probability:.3f}" for name, probability in one.best)
    file = html.escape(printable(one.file))
    parts = [figure(pictures[0], "The picture", "as the model sees it", f"{one.file}, as the model sees it")]
    for each, picture in zip(one.explanations, pictures[1:], strict=True):
        title = f"{METHODS[each.method]}: {each.class_name}"
        parts.append(figure(picture, title, each.details(), f"{each.said()}: {one.file}"))
    row = f"<div class=row>{''.join(parts)}</div>"
    return f"<section><h2>{file}</h2><p class=best>{html.escape(printable(best))}</p>{row}</section>\n"


def figure(picture: bytes, title: str, details: str, described: str) -> str:
    """A PNG, what it shows, and the same for who can't see it."""
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    title, details, alt = (html.escape(printable(text), quote=True) for text in (title, details, described))
    caption = f"<figcaption><b>{title}</b><br>{details}</figcaption>"
    return f'<figure><img src="{source}" alt="{alt}">{caption}</figure>'


def overview(found: Sequence[Explained]) -> bytes:
    """The first ROWS pictures, one a row, each followed by its overlays, as the content of a PNG file."""
    rows, columns = found[:ROWS], 1 + len(found[0].explanations)
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 6.5}):  # a name's $ begins no formula
        sheet = matplotlib.figure.Figure(figsize=(CELL * columns, (CELL + 0.35) * len(rows)), layout="constrained")
        for line, one in zip(sheet.subplots(len(rows), columns, squeeze=False), rows, strict=True):
            name, probability = one.best[0]
            titles = [f"taken for\n{shortened(name)} ({probability:.2f})"]
            titles += [f"{METHODS[each.method]}\n{shortened(each.class_name)}" for each in one.explanations]
            pictures = [one.image, *(each.over(one.image) for each in one.explanations)]
            for axes, picture, title in zip(line, pictures, titles, strict=True):
                axes.imshow(np.asarray(enlarged(picture)))
                axes.set_title(title, fontsize=6.5)
                axes.set_axis_off()
        drawn = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for it
            sheet.savefig(drawn, format="png", dpi=DPI)
    return png(PIL.Image.open(drawn).convert("RGB"))


def shortened(name: str, most: int = 20) -> str:
    """A name for a narrow place."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"
