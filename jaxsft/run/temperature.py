"""A run's temperature: fitted on a split that is not the one evaluated, and written into its model.json."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsft import cli
from jaxsft.cli import UserError
from jaxsft.data.splits import TERM, same_split
from jaxsft.interpret.calibration import at_temperature, calibrate, fit_temperature
from jaxsft.interpret.metrics import gathered
from jaxsft.interpret.multilabel import Result
from jaxsft.models.weights import CARD
from jaxsft.run import saved
from jaxsft.run.evaluation import Examples, results, step_of
from jaxsft.run.saved import Run
from jaxsft.storage import Location


def with_fitted(run: Run, examples: Examples) -> Run:
    """The run with the temperature that fits its logits about `examples` best; nothing is written.

    Raises:
      UserError: none does; see `fit_temperature`.
    """
    step, loader = step_of(run, examples, logits=True), examples.loader
    kept = ("label", "logits", "mask")
    try:
        found = results(step, examples.parallel.replicate(run.variables), loader)
        answers = gathered({name: batch[name] for name in kept} for batch in found)
    finally:
        loader.close()
    if not len(answers["label"]):
        raise UserError(f"none of {len(examples.source)} images can be read to fit a temperature on", "name others")
    temperature = fit_temperature(answers["logits"], answers["label"])
    return dataclasses.replace(run, card=dataclasses.replace(run.card, temperature=temperature))


def write(run: Run) -> None:
    """Let the run's model.json have its temperature; all else in it stays.

    Raises:
      UserError: it can't be written.
    """
    card = dataclasses.replace(saved.read_card(run.workdir), temperature=run.card.temperature)
    saved.write_card(run.workdir, card)


class Comparison:
    """What the examples that are evaluated say of the temperature that there was before; `see` is shown each batch."""

    def __init__(self, before: float):
        self.before = before
        self._seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def see(self, batch: Mapping[str, Any]) -> None:
        """Note what a batch's logits would have said."""
        mask = np.asarray(batch["mask"])
        logits, label = (np.asarray(batch[name])[mask] for name in ("logits", "label"))
        self._seen.append(at_temperature(logits, label, self.before))

    def errors(self) -> dict[str, float]:
        """The "temperature", and its "nll" and "ece"."""
        probability, is_so, nll = (np.concatenate(values) for values in zip(*self._seen, strict=True))
        return {"temperature": self.before, "nll": float(nll.mean()), "ece": calibrate(probability, is_so).ece}


def record(run: Run, fitted: Examples, comparison: Comparison, result: Result) -> dict[str, Any]:
    """As JSON: the "split" and how many "images" it was fitted on; "temperature", "nll", "ece" "before" and "after"."""
    after = {"temperature": run.card.temperature, "nll": result.nll, "ece": result.calibration().ece}
    images = len(fitted.source) - len(fitted.left_out)
    return {"split": fitted.source.split, "images": images, "before": comparison.errors(), "after": after}


def line(record: Mapping[str, Any], workdir: Location) -> str:
    """`record` for people."""
    before, after = record["before"], record["after"]
    changes = ", ".join(f"{name.upper()} {before[name]:.4f} -> {after[name]:.4f}" for name in ("nll", "ece"))
    fitted = f"fitted on {record['images']} images" + (f" ({record['split']})" if record["split"] else "")
    temperatures = f"{before['temperature']:.4g} -> {after['temperature']:.4g}"
    return f"temperature {temperatures}, {fitted}: {changes}; {workdir / CARD} has it"


def check_apart(fitted: str, evaluated: str) -> None:
    """Raise a UserError where two splits of one data set share images, or may do so.

    Args:
      fitted, evaluated: as `Source.split` has them.
    """
    if share_images(fitted, evaluated):
        what = f"a temperature fitted on {fitted!r} would be judged by images of {evaluated!r} that it was fitted on"
        raise UserError(what, "fit it on another split, or say --same-split if this is meant")


def warn_of_training(fitted: str, trained: str) -> None:
    """Say on stderr where a temperature is fitted on images of the split that was trained on."""
    if share_images(fitted, trained):
        cli.warn(f"the network was trained on {trained!r}, and is surer of its images than of others: fit on others")


def share_images(first: str, second: str) -> bool:
    """Whether two splits such as 'val[:50%]' and 'val+test' share images, or may do so.

    Slices of one split are known to be apart only where both are of counts, or both of shares, from its start.
    """
    return any(overlap(one, other) for one in parts_of(first) for other in parts_of(second))


def parts_of(split: str) -> list[tuple[str, str, str]]:
    """(name, where its slice starts, where it ends) of each part of a split; '' for what is not said."""
    found = [TERM.fullmatch(term) for term in split.split("+")]
    return [(match[1], match[2] or "", match[3] or "") if match else (split, "", "") for match in found]


def overlap(one: tuple[str, str, str], other: tuple[str, str, str]) -> bool:
    """Whether two slices share images, or may."""
    if "all" not in (one[0], other[0]) and not same_split(one[0], other[0]):
        return False
    edges = [edge for edge in (*one[1:], *other[1:]) if edge]
    shares = {edge.endswith("%") for edge in edges}
    if len(shares) > 1 or not all(re.fullmatch(r"[\d_.]+%?", edge) for edge in edges):
        return True
    spans = [(number(start, 0), number(end, np.inf)) for _, start, end in (one, other)]
    return max(start for start, _ in spans) < min(end for _, end in spans)


def number(edge: str, otherwise: float) -> float:
    """An edge of a slice as a number."""
    return float(edge.removesuffix("%")) if edge else otherwise
