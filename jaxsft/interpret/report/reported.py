"""What a report is made of: all that is known of a run, gathered by `run.reporting` from itself or its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxsft.interpret.mistakes import Mistake
from jaxsft.interpret.multilabel import METRICS, Result
from jaxsft.models.weights import ModelCard

CALLED = {
    "accuracy": "accuracy", "top5": "top-5", "loss": "loss", "map": "mAP", "f1_micro": "F1, micro",
    "f1_macro": "F1, macro",
}  # fmt: skip
OF_SEVERAL = {"accuracy": "all labels right"}  # what the accuracy of an image with several labels is


class Gallery(NamedTuple):
    """Pictures, and why there are none or fewer than wanted."""

    pictures: Sequence[Mistake] = ()
    missing: str = ""


NO_PICTURES = Gallery()


@dataclasses.dataclass(frozen=True, eq=False)
class Reported:
    """A run, as a report tells it."""

    name: str  # what it is called, and where it lies
    place: str
    config: ConfigDict
    changed: Mapping[str, Any]  # the settings that differ from their defaults
    card: ModelCard
    precision: str  # what it was computed in, as `models.precision.said` puts it
    records: Sequence[Mapping[str, Any]]  # the lines of its metrics.jsonl
    starts: Sequence[Mapping[str, Any]] = ()  # of its machines.json
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the fingerprint of its data
    step: int | None = None  # of the checkpoint that was evaluated
    result: Result | None = None  # the evaluation of that
    evaluated_on: str = ""  # what else than the run's own images
    missing: str = ""  # why there is no evaluation
    wrong: Gallery = NO_PICTURES
    unsure: Gallery = NO_PICTURES
    augmented: Gallery = NO_PICTURES
    parameters: Sequence[tuple[str, ...]] = ()  # a row each, below the names of the columns
    sizes: tuple[int, int] = (0, 0)  # how many numbers train, at the end of the run, and how many there are
    left_out: int = 0  # images that could not be read

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return bool(self.records and self.records[-1].get("final"))

    @property
    def last_evaluation(self) -> Mapping[str, Any]:
        """The last line of the log about an evaluation; empty where there is none."""
        return next((record for record in reversed(self.records) if record.get("split") == "eval"), {})

    @property
    def scalars(self) -> Mapping[str, Any]:
        """The metrics of its evaluation, or where there is none of the log's last one."""
        return self.result.scalars() if self.result is not None else self.last_evaluation

    def metrics(self) -> dict[str, tuple[str, float]]:
        """By key what each metric is called, and its value: the first is what models of the kind are compared by."""
        wanted = (*METRICS, "accuracy", "loss") if self.card.multi_label else ("accuracy", "top5", "loss")
        few = self.card.num_classes <= 5
        called = CALLED | (OF_SEVERAL if self.card.multi_label else {})
        values = self.scalars
        return {
            name: (called[name], float(values[name]))
            for name in wanted
            if isinstance(values.get(name), int | float) and not (name == "top5" and few)
        }

    def seconds(self) -> float | None:
        """How long it has trained: from each start to the last line of the log before the next one.

        None where the log holds no lines. Of a run whose starts were not noted it is from its first line to its last.
        """
        times = [record["time"] for record in self.records if isinstance(record.get("time"), int | float)]
        if not times:
            return None
        begins = [start["time"] for start in self.starts if isinstance(start.get("time"), int | float)] or [times[0]]
        total = 0.0
        for begin, end in zip(begins, [*begins[1:], float("inf")]):
            within = [time for time in times if begin <= time < end]
            total += max(within) - begin if within else 0.0
        return total

    def speed(self) -> float | None:
        """Images a second in training, the median of the log's lines; None where none tells it."""
        speeds = [r["images_per_sec"] for r in self.records if isinstance(r.get("images_per_sec"), int | float)]
        return float(np.median(speeds)) if speeds else None
