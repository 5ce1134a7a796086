"""Where each torchvision tensor lives in our variables, and how its layout changes: one table, both directions.

A Flax variable is `COLLECTION/MODULE/LEAF`, a torch tensor `MODULE.LEAF`. A family's record says what torch calls a
module (`Family.torch_name`); LEAVES and KERNELS say it of what lies in one, whatever the family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from jaxsft.cli import UserError
from jaxsft.models.families import family_of

Arrays = Mapping[str, np.ndarray]


class LayoutTransform(NamedTuple):
    """How a tensor's layout changes: its axes to Flax (None: unchanged), the axes back, and torch's dtype."""

    to_flax: tuple[int, ...] | None = None
    to_torch: tuple[int, ...] | None = None
    torch_dtype: Any = None  # None: whatever the Flax leaf has


IDENTITY = LayoutTransform()
INT64 = LayoutTransform(torch_dtype=np.int64)  # int32 in Flax: JAX has no int64 by default
# The kernels of layers by their number of axes.
KERNELS: Mapping[int, LayoutTransform] = {
    4: LayoutTransform((2, 3, 1, 0), (3, 2, 0, 1)),  # OIHW to HWIO; also right for groups: I is C_in / groups in both
    2: LayoutTransform((1, 0), (1, 0)),  # a linear layer's
}
# Flax leaf -> torch leaf; what is not here has one name in both.
LEAVES: Mapping[str, str] = {
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}

CONSTANT = 1e-6  # relative: a file's logarithms were another library's

# Absent from files written before PyTorch 0.4.1; torch itself takes it for 0 then.
OPTIONAL_LEAF = "num_batches_tracked"


def torch_tensor(flax_path: str, ndim: int, arch: str) -> tuple[str, LayoutTransform]:
    """Torch's name of a Flax variable such as "params/layer1_0/conv1/kernel", and how its `ndim` axes change."""
    _, *modules, leaf = flax_path.split("/")
    module = family_of(arch).torch_name("/".join(modules))
    transform = KERNELS[ndim] if leaf == "kernel" else INT64 if leaf == "count" else IDENTITY
    return ".".join(filter(None, (module, LEAVES.get(leaf, leaf)))), transform


def renamed(tensors: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """Tensors of a file by torchvision's names of today."""

    def today(name: str) -> str:
        for pattern, replacement in family_of(arch).renamed:
            name = re.sub(pattern, replacement, name)
        return name

    return {today(name): tensor for name, tensor in tensors.items()}


def torch_names(shapes: Mapping[str, Any], arch: str) -> set[str]:
    """Torch's names of the variables in `shapes` (`models.family.variable_shapes`)."""
    variables = {torch_tensor(path, leaf.ndim, arch)[0] for path, leaf in flatten(shapes).items()}
    return variables | family_of(arch).constants(arch).keys()


def to_flax(tensors: Arrays, shapes: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """torch tensors as the variables described by `shapes` (`models.family.variable_shapes`).

    Returns numpy arrays by collection in the shapes' dtypes, every leaf filled from exactly one tensor.

    Raises:
      UserError: one message with every missing, unused and misshapen name.
    """
    result: dict[str, np.ndarray] = {}
    missing, misshapen = [], []
    unused = dict(tensors)
    for name, constant in family_of(arch).constants(arch).items():
        tensor = unused.pop(name, None)
        if tensor is None:
            missing.append(name)
        elif tensor.shape != constant.shape or not np.allclose(tensor, constant, rtol=CONSTANT, atol=CONSTANT):
            misshapen.append(f"{name} {tensor.shape}, which holds other values than those of {arch}")
    for path, leaf in flatten(shapes).items():
        name, transform = torch_tensor(path, leaf.ndim, arch)
        tensor = unused.pop(name, None)
        if tensor is None and name.endswith(OPTIONAL_LEAF):
            tensor = np.zeros((), np.int64)
        if tensor is None:
            missing.append(name)
            continue
        if transform.to_flax is not None and tensor.ndim == len(transform.to_flax):
            tensor = tensor.transpose(transform.to_flax)
        if tensor.shape != leaf.shape:
            expected = (
                leaf.shape if transform.to_torch is None else tuple(leaf.shape[axis] for axis in transform.to_torch)
            )
            misshapen.append(f"{name} {tuple(tensors[name].shape)}, expected {expected}")
            continue
        result[path] = np.array(tensor, leaf.dtype, order="C")
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (("missing", missing), ("unused", sorted(unused)), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise UserError(f"the weights do not fit {arch}: {'; '.join(problems)}", "name the arch they were made for")
    return unflatten(result)


def to_torch(variables: Mapping[str, Any], arch: str) -> dict[str, np.ndarray]:
    """Flax variables as tensors under torchvision's names: `to_flax` backwards, bit for bit."""
    tensors = {}
    for path, leaf in flatten(variables).items():
        array = np.asarray(leaf)
        name, transform = torch_tensor(path, array.ndim, arch)
        if transform.to_torch is not None:
            array = array.transpose(transform.to_torch)
        tensors[name] = np.array(array, transform.torch_dtype or array.dtype, order="C")
    return tensors | constants(arch, tensors)


def constants(arch: str, tensors: Arrays) -> dict[str, np.ndarray]:
    """What torch's state_dict holds beside the variables, whole numbers as int64, others in the dtype of `tensors`."""
    floating = next((array.dtype for array in tensors.values() if array.dtype.kind not in "iu"), np.dtype(np.float32))
    found = family_of(arch).constants(arch)
    return {name: value if value.dtype.kind in "iu" else value.astype(floating) for name, value in found.items()}


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """{"params": {"fc": {"bias": x}}} as {"params/fc/bias": x}."""
    return traverse_util.flatten_dict(dict(variables), sep="/")


def unflatten(paths: Mapping[str, Any]) -> dict[str, Any]:
    """`flatten` backwards."""
    return traverse_util.unflatten_dict(dict(paths), sep="/")
