"""The best evaluation of a run, by which its best checkpoint is kept."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxsft.run.log import records
from jaxsft.storage import Location


@dataclasses.dataclass
class Best:
    """The best evaluation so far by one metric, the first of equals; a `metric` of '' has none."""

    metric: str
    step: int | None = None
    value: float = math.nan

    @classmethod
    def of(cls, workdir: Location, metric: str, up_to: float = math.inf) -> Best:
        """The best that metrics.jsonl knows up to a step."""
        best = cls(metric)
        for record in records(workdir):
            if record.get("split") == "eval" and record["step"] <= up_to:
                best.update(record["step"], record)
        return best

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Make the evaluation of `step` the best where it is better; never one whose loss is not finite."""
        value = values.get(self.metric)
        if value is None or not is_finite(value) or not is_finite(values.get("loss", 0.0)):
            return
        if self.step is None or (value < self.value if self.metric == "loss" else value > self.value):
            self.step, self.value = step, value


def is_finite(value: Any) -> bool:
    """Whether `value` is a number, neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)
