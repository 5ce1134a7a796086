"""The examples that a model takes for something else, the surest first, to be looked at."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image

from jaxsft.cli import printable
from jaxsft.data.base import Source
from jaxsft.data.classes import said

SHOWN = 128  # px, the longer side of a picture in a table
CARD = "display:inline-block; margin:4px; width:140px; vertical-align:top; font-size:12px; overflow-wrap:anywhere"


class Mistake(NamedTuple):
    """An example that is taken for something else."""

    file: str  # or 'image 3', the number in its split, where it has none
    image: PIL.Image.Image
    label: str  # the class that it is of; of several "ant, bee", of none "-"
    predicted: str  # what it is taken for
    probability: float  # of that; of several labels that of the surest mistake about one


class Mistakes(tuple[Mistake, ...]):
    """Mistakes, the surest first; a notebook shows their pictures."""

    def _repr_html_(self) -> str:
        """What IPython displays."""
        return "".join(map(as_html, self)) or "no mistakes"


def rank(answers: Mapping[str, np.ndarray], most: int) -> np.ndarray:
    """The rows of up to `most` wrong answers, the most probable ones first, of equals the first: int [n].

    Args:
      answers: "label", "predicted" int32 [N] or 0 and 1 [N, K], "probability" float [N]; a NaN is no answer.
      most: how many.
    """
    differs = answers["label"] != answers["predicted"]
    differs = differs if differs.ndim == 1 else differs.any(1)
    wrong = np.flatnonzero(differs & ~np.isnan(answers["probability"]))
    return wrong[np.argsort(-answers["probability"][wrong], kind="stable")][:most]


def unsure(answers: Mapping[str, np.ndarray], most: int) -> np.ndarray:
    """The rows of up to `most` answers, right and wrong, that a model is least sure of, the least first: int [n].

    That is the lowest probability of the prediction; of several labels that of the decision nearest to one half.

    Args:
      answers: as for `rank`, of several labels also "logits" [N, K].
      most: how many.
    """
    known = np.flatnonzero(~np.isnan(answers["probability"]))
    sure = np.abs(answers["logits"]).min(1) if "logits" in answers else answers["probability"]
    return known[np.argsort(sure[known], kind="stable")][:most]


def mistakes(source: Source, answers: Mapping[str, np.ndarray], class_names: Sequence[str], most: int) -> Mistakes:
    """The surest of the wrong answers about examples of `source`.

    Args:
      source: what was asked about.
      answers: as for `rank`, and "example" int32 [N].
      class_names: of the model.
      most: how many.
    """
    found = []
    for row in rank(answers, most):
        number = int(answers["example"][row])
        label, predicted = (said(answers[name][row], class_names) for name in ("label", "predicted"))
        image = source[number]
        image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
        probability = float(answers["probability"][row])
        found.append(Mistake(source.name(number), image, label, predicted, probability))
    return Mistakes(found)


def as_html(mistake: Mistake) -> str:
    """A picture and what it is taken for, as HTML."""
    image = mistake.image.copy()
    image.thumbnail((SHOWN, SHOWN))
    picture = io.BytesIO()
    image.save(picture, "PNG")
    file, label, predicted = (html.escape(printable(text)) for text in (mistake.file, mistake.label, mistake.predicted))
    source = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    return (
        f"<div style='{CARD}'><img src='{source}' alt='' title='{file}' style='width:{SHOWN}px'><br>"
        f"<b>{label}</b> taken for {predicted} ({mistake.probability:.2f})</div>"
    )
