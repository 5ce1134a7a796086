"""Exact counts of an evaluation, and what is said of them.

The device sums counts over examples, devices and batches; ratios are taken once, on the host. A mean of batch means
would weigh a partial batch wrongly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def count(logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the examples where `mask` holds, of one device.

    Args:
      logits: [N, K].
      labels: int32 [N].
      losses: [N].
      mask: bool [N].

    Returns:
      "loss" float, "top1", "top5" and "count" int32 scalars, "per_label" int32 [K], the examples of each label, and
      "confusion" int32 [K, K] (row: label, column: the class predicted). A class counts as ranked before the label's
      when its logit is larger, or equal at a smaller index: ties are broken in one way only. A row with a NaN ranks
      nothing: it counts as wrong for top1 and top5 and has no prediction to stand in "confusion".
    """
    classes = logits.shape[-1]
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(classes) < labels[:, None]
    ranked = mask & ~jnp.isnan(logits).any(1) & (labels >= 0) & (labels < classes)
    rank = ((logits > own) | ((logits == own) & earlier)).sum(1)
    predicted = logits.argmax(1)  # the first of equals, as above
    return {
        "loss": jnp.where(mask, losses, 0).sum(),
        "top1": (ranked & (rank < 1)).sum(dtype=jnp.int32),
        "top5": (ranked & (rank < 5)).sum(dtype=jnp.int32),
        "count": mask.sum(dtype=jnp.int32),
        "per_label": jnp.zeros(classes, jnp.int32).at[labels].add(mask.astype(jnp.int32)),
        "confusion": jnp.zeros((classes, classes), jnp.int32).at[labels, predicted].add(ranked.astype(jnp.int32)),
    }


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
    """The result over a whole split."""

    loss: float  # mean over examples
    accuracy: float
    top5: float
    count: int
    per_label: np.ndarray  # int64 [K]
    confusion: np.ndarray  # int64 [K, K]

    @classmethod
    def of(cls, batches: Iterable[dict[str, Any]]) -> Evaluation:
        """From the counts of every batch, on the host, each added as it comes: memory for one confusion matrix."""
        total: dict[str, Any] = {}
        for counts in batches:
            for key, value in counts.items():
                if key in total:
                    total[key] += value
                else:
                    total[key] = np.array(value, np.float64 if key == "loss" else np.int64)
        n = int(total["count"])
        return cls(
            float(total["loss"] / n),
            float(total["top1"] / n),
            float(total["top5"] / n),
            n,
            total["per_label"],
            total["confusion"],
        )

    def __repr__(self) -> str:
        return f"<{self.summary()}>"

    def summary(self) -> str:
        """One line for people."""
        right, classes = round(self.accuracy * self.count), len(self.confusion)
        top5 = f", top-5 {self.top5:.4f}" + (f" of {classes} classes" if classes < 10 else "") if classes > 5 else ""
        return f"accuracy {self.accuracy:.4f} ({right} of {self.count}){top5}, loss {self.loss:.4f}"

    def scalars(self) -> dict[str, Any]:
        """Loss, accuracy, top-5 and count, as metrics.jsonl has them."""
        return {"loss": self.loss, "accuracy": self.accuracy, "top5": self.top5, "count": self.count}

    def per_class(self) -> np.ndarray:
        """Accuracy of each class, float64 [K]; NaN for a class without examples."""
        with np.errstate(invalid="ignore"):
            return np.diag(self.confusion) / self.per_label

    def record(self, class_names: tuple[str, ...]) -> dict[str, Any]:
        """As JSON: loss, accuracy, top5, count, per_class by name, confusion."""
        classes = zip(class_names, self.per_class().tolist(), strict=True)
        return {
            **self.scalars(),
            "per_class": {name: None if np.isnan(value) else value for name, value in classes},
            "confusion": self.confusion.tolist(),
        }
