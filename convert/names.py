"""One table of names, used in both directions: where each torchvision tensor lives in our variables, and how it turns.

A Flax variable is `COLLECTION/MODULE/LEAF`, a torch tensor `MODULE.LEAF`. MODULES says how module names translate and
what kind each module is, LEAVES how the leaves of a kind do. Everything else here reads those two tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from jaxsft.cli import UserError

Arrays = Mapping[str, np.ndarray]

# Flax module pattern -> (torch module, kind). The patterns are exclusive: a module fits one.
MODULES: tuple[tuple[str, str, str], ...] = (
    (r"conv1", "conv1", "conv"),
    (r"bn1", "bn1", "norm"),
    (r"layer(\d)_(\d+)/conv(\d)", r"layer\1.\2.conv\3", "conv"),
    (r"layer(\d)_(\d+)/bn(\d)", r"layer\1.\2.bn\3", "norm"),
    (r"layer(\d)_(\d+)/downsample_conv", r"layer\1.\2.downsample.0", "conv"),
    (r"layer(\d)_(\d+)/downsample_bn", r"layer\1.\2.downsample.1", "norm"),
    (r"fc", "fc", "linear"),
)


class Turn(NamedTuple):
    """How an array changes on its way: the axes to Flax (None: unchanged), the axes back, and both dtypes' kinds."""

    to_flax: tuple[int, ...] | None = None
    to_torch: tuple[int, ...] | None = None
    torch_dtype: Any = None  # None: whatever the Flax leaf has


OIHW_HWIO = Turn((2, 3, 1, 0), (3, 2, 0, 1))
TRANSPOSED = Turn((1, 0), (1, 0))
SAME = Turn()
COUNTER = Turn(torch_dtype=np.int64)  # int32 in Flax: JAX has no int64 by default

# (kind, collection, Flax leaf) -> (torch leaf, turn)
LEAVES: Mapping[tuple[str, str, str], tuple[str, Turn]] = {
    ("conv", "params", "kernel"): ("weight", OIHW_HWIO),  # also right for groups: I is C_in / groups in both
    ("linear", "params", "kernel"): ("weight", TRANSPOSED),
    ("linear", "params", "bias"): ("bias", SAME),
    ("norm", "params", "scale"): ("weight", SAME),
    ("norm", "params", "bias"): ("bias", SAME),
    ("norm", "batch_stats", "mean"): ("running_mean", SAME),
    ("norm", "batch_stats", "var"): ("running_var", SAME),
    ("norm", "batch_stats", "count"): ("num_batches_tracked", COUNTER),
}

# Absent from files written before PyTorch 0.4.1; torch itself takes it for 0 then.
OPTIONAL_LEAF = "num_batches_tracked"


def torch_name(flax_path: str) -> tuple[str, Turn]:
    """Torch's name of a Flax variable such as "params/layer1_0/conv1/kernel", and how its array turns.

    Raises:
      KeyError: the table has no such variable; the model has grown and the table has not.
    """
    collection, *middle, leaf = flax_path.split("/")
    module = "/".join(middle)
    for pattern, replacement, kind in MODULES:
        match = re.fullmatch(pattern, module)
        if match:
            torch_leaf, turn = LEAVES[kind, collection, leaf]
            return f"{match.expand(replacement)}.{torch_leaf}", turn
    raise KeyError(f"no rule of convert.names covers {flax_path}")


def to_flax(tensors: Arrays, shapes: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """Turn torch tensors into the variables described by `shapes` (`models.resnet.variable_shapes`).

    Returns {"params": ..., "batch_stats": ...} of numpy arrays in the shapes' dtypes, every leaf filled from exactly
    one tensor.

    Raises:
      UserError: one message with every missing, unused and misshapen name.
    """
    result: dict[str, np.ndarray] = {}
    missing, misshapen = [], []
    unused = dict(tensors)
    for path, leaf in flatten(shapes).items():
        name, turn = torch_name(path)
        tensor = unused.pop(name, None)
        if tensor is None and name.endswith(OPTIONAL_LEAF):
            tensor = np.zeros((), np.int64)
        if tensor is None:
            missing.append(name)
            continue
        if turn.to_flax is not None and tensor.ndim == len(turn.to_flax):
            tensor = tensor.transpose(turn.to_flax)
        if tensor.shape != leaf.shape:
            expected = leaf.shape if turn.to_torch is None else tuple(leaf.shape[axis] for axis in turn.to_torch)
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


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Turn Flax variables into tensors under torchvision's names: `to_flax` backwards, bit for bit."""
    tensors = {}
    for path, leaf in flatten(variables).items():
        name, turn = torch_name(path)
        array = np.asarray(leaf)
        if turn.to_torch is not None:
            array = array.transpose(turn.to_torch)
        tensors[name] = np.array(array, turn.torch_dtype or array.dtype, order="C")
    return tensors


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """{"params": {"fc": {"bias": x}}} as {"params/fc/bias": x}."""
    return traverse_util.flatten_dict(dict(variables), sep="/")


def unflatten(paths: Mapping[str, Any]) -> dict[str, Any]:
    """`flatten` backwards."""
    return traverse_util.unflatten_dict(dict(paths), sep="/")
