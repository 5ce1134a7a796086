"""What a tensor of a file must be to be taken for weights: numbers with a value, every one of them finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import reason
from jaxsft.cli import UserError

FLOATING = ("float16", "bfloat16", "float32", "float64")
INTEGER = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
COUNTER, VARIANCE = "num_batches_tracked", "running_var"  # batch norm's: the one integer, and what can't be below 0
LARGEST_COUNT = 2**31 - 1  # it is int32 in Flax


def as_arrays(values: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """The tensors of `path`, torch's or numpy's, as arrays: float32, and the counters in their integers.

    Half precision is widened, which is exact; float64 is rounded. A tensor is looked at before memory is taken for it.

    Raises:
      UserError: one is no plain array of floating numbers, or holds NaN, an infinity or a negative variance; it is
        named.
    """
    arrays = {}
    for name, value in values.items():
        try:
            wrong = unusable(name, value)
            array = None if wrong else as_numpy(value)
        except (RuntimeError, TypeError) as error:  # tensors of kinds that torch itself can't turn
            wrong, array = f"can't be read: {reason(error)}", None
        if array is not None:
            wrong = misvalued(name, array)
            arrays[name] = array if is_counter(name) else rounded(array)
        if wrong:
            raise UserError(f"{path}: {name!r} {wrong}", "save a state_dict() of plain, finite float32 tensors")
    return arrays


def unusable(name: str, value: Any) -> str:
    """Why this object is no plain array of the right kind, told without touching its numbers; '' where it is one."""
    if not isinstance(value, np.ndarray):
        if not all(hasattr(value, attribute) for attribute in ("layout", "dtype", "untyped_storage")):
            return f"is a {type(value).__name__}, not a tensor"
        for kind in ("meta", "quantized", "nested", "sparse", "mkldnn"):
            if getattr(value, f"is_{kind}"):
                return f"is a {kind} tensor"
        if str(value.layout) != "torch.strided":  # such as the compressed sparse ones
            return f"is a {str(value.layout).removeprefix('torch.')} tensor"
        if (needed := value.numel() * value.element_size()) > (stored := value.untyped_storage().nbytes()):
            return f"is a view that asks for {needed:,} bytes of the {stored:,} there are"
    kind, allowed = str(value.dtype).removeprefix("torch."), INTEGER if is_counter(name) else FLOATING
    return "" if kind in allowed else f"holds {kind}, not one of {', '.join(allowed)}"


def as_numpy(value: Any) -> np.ndarray:
    """A torch tensor, or an array as it is, as an array; bfloat16, which numpy has not, as float32."""
    if isinstance(value, np.ndarray):
        return value
    return (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy(force=True)


def misvalued(name: str, array: np.ndarray) -> str:
    """Why these numbers can't be those of the tensor `name`; '' where they can."""
    if is_counter(name):
        return "" if np.all((array >= 0) & (array <= LARGEST_COUNT)) else "counts below 0 or beyond 31 bits"
    if not np.isfinite(rounded(array)).all():
        return "holds NaN, an infinity or a number too large for float32"
    return "holds a variance below 0" if name.endswith(VARIANCE) and np.any(array < 0) else ""


def is_counter(name: str) -> bool:
    """Whether the tensor `name` counts batches."""
    return name.endswith(COUNTER)


def rounded(array: np.ndarray) -> np.ndarray:
    """`array` in float32."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)
