"""Exact counts of an evaluation, and what is said of them.

The device sums counts over examples, devices and batches; ratios are taken once, on the host. A mean of batch means
would weigh a partial batch wrongly.
"""

from __future__ import annotations

import dataclasses
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
      "loss" float, "top1", "top5" and "count" int32 scalars, and "confusion" int32 [K, K] (row: label, column: the
      class predicted). A class counts as ranked before the label's when its logit is larger, or equal at a smaller
      index: ties are broken in one way only. A row with a NaN ranks nothing: it counts as wrong for top1 and top5, and
      in `count`, and has no prediction to stand in `confusion`.
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
        "confusion": jnp.zeros((classes, classes), jnp.int32).at[labels, predicted].add(ranked.astype(jnp.int32)),
    }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result over a whole split."""

    loss: float  # mean over examples
    accuracy: float
    top5: float
    count: int
    confusion: np.ndarray  # int64 [K, K]

    @classmethod
    def of(cls, batches: list[dict[str, Any]]) -> Evaluation:
        """From the counts of every batch, on the host."""
        total = {key: np.sum([np.asarray(b[key], np.float64) for b in batches], axis=0) for key in batches[0]}
        n = int(total["count"])  # counts stay whole numbers in float64 up to 2**53
        return cls(
            float(total["loss"] / n),
            float(total["top1"] / n),
            float(total["top5"] / n),
            n,
            total["confusion"].astype(np.int64),
        )

    def summary(self) -> str:
        """One line for people."""
        right = round(self.accuracy * self.count)
        return f"accuracy {self.accuracy:.4f} ({right} of {self.count}), top-5 {self.top5:.4f}, loss {self.loss:.4f}"

    def scalars(self) -> dict[str, Any]:
        """Loss, accuracy, top-5 and count, as metrics.jsonl has them."""
        return {"loss": self.loss, "accuracy": self.accuracy, "top5": self.top5, "count": self.count}

    def per_class(self) -> np.ndarray:
        """Accuracy of each class, float64 [K]; NaN for a class without examples."""
        with np.errstate(invalid="ignore"):
            return np.diag(self.confusion) / self.confusion.sum(1)

    def record(self, class_names: tuple[str, ...]) -> dict[str, Any]:
        """As JSON: loss, accuracy, top5, count, per_class by name, confusion."""
        classes = zip(class_names, self.per_class().tolist(), strict=True)
        return {
            **self.scalars(),
            "per_class": {name: None if np.isnan(value) else value for name, value in classes},
            "confusion": self.confusion.tolist(),
        }
