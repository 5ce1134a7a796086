"""A network that compiles in a second, for tests of what is around networks; and torch's of the same."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxsft.models.layers import BatchNorm, Linear
from jaxsft.models.pooling import global_average_pool
from jaxsft.models.stochastic import Dropout, Keys, StochasticDepth

CLASSES, SIDE = 4, 6
# Half the time of a test is compiling what then runs for milliseconds.
compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
Variables = dict[str, Any]


class Tiny(nn.Module):
    """A 1x1 convolution, batch norm, ReLU, the mean over all pixels, a head: [N, H, W, 3] to [N, classes], float64."""

    num_classes: int = CLASSES
    dropout: float = 0.0  # of each value before the head, and of each image before the pooling
    frozen: tuple[str, ...] = ()
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: Keys = None) -> jax.Array:
        x = nn.Dense(5, use_bias=False, name="conv1", param_dtype=jnp.float64)(x)
        norm = BatchNorm(name="bn1", frozen=self.frozen, axis_name=self.axis_name, param_dtype=jnp.float64)
        x = StochasticDepth(self.dropout, name="depth")(nn.relu(norm(x, train)), keys)
        x = Dropout(self.dropout, name="dropout")(global_average_pool(x), keys)
        return Linear(self.num_classes, param_dtype=jnp.float64, name="fc")(x)


def variables(seed: int = 0) -> Variables:
    """Of `Tiny`, float64, none of them at 0 or 1; as numpy arrays, which no step can donate."""
    rng = np.random.default_rng(seed)
    params = {
        "conv1": {"kernel": rng.normal(0, 0.5, (3, 5))},
        "bn1": {"scale": rng.uniform(0.5, 1.5, 5), "bias": rng.normal(0, 0.3, 5)},
        "fc": {"kernel": rng.normal(0, 1, (5, CLASSES)), "bias": rng.normal(0, 0.3, CLASSES)},
    }
    stats = {"mean": rng.normal(0, 0.3, 5), "var": rng.uniform(0.5, 1.5, 5), "count": np.int32(7)}
    return {"params": params, "batch_stats": {"bn1": stats}}


def in_torch(values: Variables) -> torch.nn.Module:
    """The same network of torch's, float64, with the same values."""
    layers = {
        "conv1": torch.nn.Conv2d(3, 5, 1, bias=False),
        "bn1": torch.nn.BatchNorm2d(5),
        "relu": torch.nn.ReLU(),
        "pool": torch.nn.AdaptiveAvgPool2d(1),
        "flat": torch.nn.Flatten(),
        "fc": torch.nn.Linear(5, CLASSES),
    }
    model = torch.nn.Sequential(OrderedDict(layers)).double()
    model.load_state_dict({name: torch.tensor(value) for name, value in state_dict(values).items()})
    return model


def state_dict(values: Variables) -> dict[str, np.ndarray]:
    """Our variables by torch's names and in its layouts."""
    params, norm = values["params"], values["batch_stats"]["bn1"]
    found = {
        "conv1.weight": np.asarray(params["conv1"]["kernel"]).T[:, :, None, None],
        "bn1.weight": params["bn1"]["scale"],
        "bn1.bias": params["bn1"]["bias"],
        "bn1.running_mean": norm["mean"],
        "bn1.running_var": norm["var"],
        "bn1.num_batches_tracked": np.asarray(norm["count"], np.int64),
        "fc.weight": np.asarray(params["fc"]["kernel"]).T,
        "fc.bias": params["fc"]["bias"],
    }
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def batch(number: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Images float64 [size, SIDE, SIDE, 3] and labels int32 [size], others for each number."""
    rng = np.random.default_rng([7, number])
    return rng.standard_normal((size, SIDE, SIDE, 3)), rng.integers(CLASSES, size=size, dtype=np.int32)


def batch_of(number: int, size: int = 16, **more: np.ndarray) -> dict[str, np.ndarray]:
    """`batch` as a train step takes it, and what else it is to have."""
    images, labels = batch(number, size)
    return {"example": np.arange(size, dtype=np.int32), "image": images, "label": labels, **more}
