"""Rows of a comparison: how far ours lies from torch's, what is allowed and why, and the table that people read."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

# Allowed |difference|, relative to the largest |value| of torch's tensor, by kind of quantity and dtype.
#
# float64: the algorithm. A rounding is 1.1e-16; batch norm over few values magnifies it by 1 / deviation in every layer
# and ten updates by momentum add up, which costs five digits at most. 1e-10 is still a thousand times smaller than the
# smallest error of the algorithm that is worth the name (torch's 1e-6 in clipping).
#
# float32: what users see, 5.4e8 times coarser.
#   activation, logits: sums of up to 4,608 products, each rounded to 6e-8, in another order. Layers carry it on:
#     torch's own float32 leaves its own float64 by 6e-6 within VGG-19 with batch norm, by 5e-6 within Swin V2-B, and
#     by 4e-6 of VGG's logits.
#   running statistics: means over at least 32 values of the above.
#   gradient, momentum: ReLU passes a gradient or it does not. Of a million activations a few are zero but for rounding;
#     the two sides decide differently there, and one of the B * H * W terms of a sum is in or out. In the last stage
#     of a small image these terms are 32. Such a jump is no larger than a tenth of the largest gradient of the network
#     (measured: 0.06), but it can be all of a tensor whose own gradient nearly cancels: here, and only here, all
#     tensors are taken relative to the largest value of the network. float64 agrees to 1e-13, each relative to itself;
#     torch's own float32 jumps as much against its own float64. Whether any activation lies on the other side of a bend
#     is counted (`jumps`): where none does, a gradient is held to what max-pools that take another of two equal values
#     may still move. After some updates there always are some, so momentum is not.
#   input: a division, a subtraction and another division of equal levels.
#   parameter: moves by rate * momentum.
#   loss: a mean over logits.
# Everything that counts (accuracy, num_batches_tracked, bit-equal round trips) has no tolerance at all.
TOLERANCES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "float64": {"exact": 0.0, "default": 1e-10},
        "float32": {
            "exact": 0.0,
            "activation": 1e-5,
            "train activation": 1e-4,
            "logits": 1e-5,
            "picture logits": 1e-5,
            "input": 1e-6,
            "loss": 1e-5,
            "gradient": 1e-2,
            "gradient that jumps": 3e-1,
            "statistics": 1e-4,
            "rate": 1e-6,
            "step loss": 1e-4,
            "step momentum": 3e-1,
            "step parameter": 1e-3,
            "step statistics": 1e-3,
        },
    }
)

BENDS = (-3.0, 0.0, 3.0, 6.0)  # of ReLU, ReLU6, hard sigmoid and hard swish
JUMPS = "(may jump)"  # beside a wide tolerance; the footer says what jumps
PICTURES = "pictures"  # what rows of pictures begin with, whose names end in a path
TAKEN_AWAY = "gradient that batch norm takes away"
PER_TENSOR = frozenset(
    (
        "activation",
        "gradient",
        TAKEN_AWAY,
        "parameter",
        "momentum",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    )
)


def tolerance(kind: str, dtype: str) -> float:
    """The tolerance of a kind of quantity: a key of TOLERANCES["float32"]."""
    if kind not in TOLERANCES["float32"]:
        raise KeyError(kind)
    of_dtype = TOLERANCES[dtype]
    return of_dtype[kind] if kind in of_dtype else of_dtype["default"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One quantity compared. `max_abs` and `relative` are None where no number says it: other shapes, NaN, infinity."""

    name: str  # PHASE/QUANTITY/TENSOR, torch's name of the tensor
    max_abs: float | None
    relative: float | None  # max_abs / largest |value| of torch's tensor (of float32 gradients: of all tensors)
    tolerance: float  # of `relative`
    passed: bool
    note: str = ""

    def group(self) -> str:
        """What the row is summed up under: its name without the tensor, activations by stage."""
        if self.name.startswith(f"{PICTURES}/"):
            return "/".join(self.name.split("/", 2)[:2])
        # Of layer1.0.conv1 layer1, of features.3.block.0 features.3: as far as the first number.
        stage = re.match(r"(.*/activation/([^./\d]+[.])*[^./]*\d[^./]*)[.]", self.name)
        quantity = self.name.rpartition("/")[0]
        of_tensors = quantity.rpartition("/")[2] in PER_TENSOR
        return stage.group(1) if stage else quantity if of_tensors else self.name

    def record(self) -> dict[str, Any]:
        """As JSON."""
        fields = dataclasses.asdict(self)
        return (
            fields if self.note and not self.passed else {key: value for key, value in fields.items() if key != "note"}
        )


def jumps(ours: Mapping[str, np.ndarray], torch: Mapping[str, np.ndarray]) -> int:
    """How many activations lie on another side of a bend than torch's: their gradients jump."""
    bends = np.array(BENDS)
    return sum(
        int((np.searchsorted(bends, ours[name]) != np.searchsorted(bends, value)).sum())
        for name, value in torch.items()
        if ours[name].shape == value.shape
    )


def compared(name: str, ours: Any, torch: Any, allowed: float, largest: float | None = None, why: str = "") -> Row:
    """Hold one array against torch's: same shape, and max |ours - torch| / max |torch| at most `allowed`.

    `largest` takes the place of max |torch|; `why` the tolerance is wide, where it is.
    """
    ours, torch = np.asarray(ours), np.asarray(torch)
    if ours.shape != torch.shape:
        return Row(name, None, None, allowed, False, f"shape {ours.shape}, torch has {torch.shape}")
    with np.errstate(all="ignore"):
        difference = np.abs(ours.astype(np.float64) - torch.astype(np.float64))
        max_abs = float(difference.max(initial=0.0))
        scale = float(np.abs(torch.astype(np.float64)).max(initial=0.0)) if largest is None else largest
        relative = 0.0 if max_abs == 0 else float(np.float64(max_abs) / scale)
    if not np.isfinite(relative):
        return Row(name, max_abs if np.isfinite(max_abs) else None, None, allowed, False, "not finite")
    return Row(name, max_abs, relative, allowed, relative <= allowed, why)


def identical(name: str, ours: Mapping[str, np.ndarray], torch: Mapping[str, np.ndarray]) -> Row:
    """Hold sets of arrays against each other bit for bit: same names, dtypes, shapes and bytes."""
    differing = [
        key
        for key in sorted(ours.keys() | torch.keys())
        if key not in ours
        or key not in torch
        or (ours[key].dtype, ours[key].shape, ours[key].tobytes())
        != (torch[key].dtype, torch[key].shape, torch[key].tobytes())
    ]
    count = float(len(differing))
    return Row(name, count, count, 0.0, not differing, f"differing: {', '.join(differing)}" if differing else "")


def held(name: str, passed: bool, otherwise: str) -> Row:
    """What must be so and is no comparison; `otherwise` says what is found where it is not."""
    return Row(name, None, None, 0.0, passed, "" if passed else otherwise)


def first_failure(rows: Iterable[Row]) -> Row | None:
    """The first row that failed, in the order of computation: the first differing layer."""
    return next((row for row in rows if not row.passed), None)


HEADER = f"{'quantity':42} {'tensors':>7}  {'max |diff|':>10} {'relative':>10} {'tolerance':>10}  result"


def footer(rows: Iterable[Row], dtype: str) -> Iterable[str]:
    """What the columns mean, for those who read a table without this file."""
    yield "relative: the largest |ours - torch's| of a tensor over torch's largest |value| in it; the worst tensor's."
    names = [row.name for row in rows]
    if any(f"/{TAKEN_AWAY}/" in name for name in names):
        yield f"  Of a {TAKEN_AWAY}, which is 0 but for rounding: over the largest of all tensors."
    if any("/rate" in name for name in names):
        yield "  Of a learning rate: over the largest so far."
    if dtype == "float32" and any(re.search("/(gradient|momentum)/", name) for name in names):
        yield "  Of float32 gradients and momentum: over the largest of all tensors."
        yield "(may jump): an activation that is 0 but for rounding may pass its gradient on one side only; torch's own"
        yield "  float32 leaves its own float64 by as much. The proof is --dtype float64, which holds it to 1e-10."
    yield "A tolerance of 0 is equality, bit for bit; a row without numbers holds or does not."


def format_number(value: float | None) -> str:
    """Two digits, or a dash."""
    return f"{value:10.1e}" if value is not None else f"{'-':>10}"


def lines(rows: Iterable[Row], every: bool = False) -> Iterable[str]:
    """The table, line by line, as the rows come: one line a quantity with its worst tensor, or `every` tensor's own."""
    for group, members in itertools.groupby(rows, key=Row.group):
        together = list(members)
        shown = together if every else [max(together, key=badness)]
        for row in shown:
            label = row.name if every else group
            failed = row.name.removeprefix(f"{group}/") if group.startswith(PICTURES) else row.name.rpartition("/")[2]
            tail = f"ok  {row.note}".rstrip() if row.passed else f"FAIL {failed} {row.note}".rstrip()
            count = 1 if every else len(together)
            yield (
                f"{label:42} {count:7d}  {format_number(row.max_abs)} {format_number(row.relative)}"
                f" {row.tolerance:10.0e}  {tail}"
            )


def badness(row: Row) -> tuple[bool, float]:
    """Sorts rows of one group: failed ones last, then by their difference."""
    return not row.passed, np.inf if row.relative is None else row.relative
