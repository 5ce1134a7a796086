"""What a tensor from a stranger's file must be before it counts as a weight: dense, floating, finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxsft.cli import UserError

COUNTER, VARIANCE = "num_batches_tracked", "running_var"
AGAIN = "save the weights again, as dense floating-point tensors that are finite"


def checked(name: str, value: Any, path: object) -> np.ndarray:
    """A tensor of torch's or numpy's as an array: float64 as it is, all narrower floats as float32, counters int64.

    Raises:
      UserError: it is sparse, quantised, without data, a view of more than its file holds; complex or of integers; not
        finite in float32; a negative variance or count.
    """
    array = value if isinstance(value, np.ndarray) else of_torch(name, value, path)
    if name.endswith(COUNTER):
        if array.dtype.kind not in "iu" or array.ndim or array < 0:
            raise UserError(f"{path}: {name} is {describe(array)}, no count", AGAIN)
        return array.astype(np.int64)
    if not is_floating(array.dtype):
        raise UserError(f"{path}: {name} is of {array.dtype}, not of floating-point numbers", AGAIN)
    array = array if array.dtype.itemsize >= 4 else array.astype(np.float32)
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32)).all()
    if not finite:
        raise UserError(f"{path}: {name} holds NaN or infinity (in float32)", AGAIN)
    if name.endswith(VARIANCE) and (array < 0).any():
        raise UserError(f"{path}: {name} holds a negative variance", AGAIN)
    return array


def of_torch(name: str, value: Any, path: object) -> np.ndarray:
    """The array of a torch tensor, before its dtype is looked at; narrow floats are widened on the way."""
    import torch

    kinds = {
        "sparse": value.layout != torch.strided and not value.is_nested,
        "nested": value.is_nested,
        "quantised": value.is_quantized,
        "without data": value.is_meta,
    }
    if kind := next((kind for kind, is_so in kinds.items() if is_so), None):
        raise UserError(f"{path}: {name} is {kind}", AGAIN)
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        size = value.numel() * value.element_size() / 2**30
        raise UserError(f"{path}: {name} is a view that asks for {size:.1f} GiB, more than is stored", AGAIN)
    value = value.detach().resolve_conj().resolve_neg()
    narrow = value.is_floating_point() and value.element_size() < 4  # bfloat16 and float8 are unknown to numpy
    return (value.float() if narrow else value).numpy()


def is_floating(dtype: Any) -> bool:
    """Whether numbers of `dtype` are floating-point; ml_dtypes' bfloat16 and float8 are, which numpy calls void."""
    return dtype.kind == "f" or (dtype.kind == "V" and dtype.name.startswith(("bfloat", "float")))


def describe(array: np.ndarray) -> str:
    """The value of a single number, or the dtype and shape."""
    return str(array) if array.ndim == 0 else f"{array.dtype} {array.shape}"
