"""The numbers of a run as arguments of its compiled step: its rates, weight decay, momentum, seed and so on.

A number that is compiled into a step makes it another program: the same command with another learning rate would be
compiled anew, for longer than a small run takes. Here a step depends on shapes and methods alone. The numbers come with
the data set that it is called with; the learning rate comes as that of every update, whatever its schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxsft import config as config_module
from jaxsft.learn.average import swa_start

# Keys that are in no program, for they make the rates.
RATE = ("optim.lr", "optim.lr_scaling", "optim.schedule", "optim.schedule_by", "optim.warmup_epochs",
        "optim.warmup_steps", "optim.step_epochs", "optim.step_factor", "optim.power", "optim.onecycle_warmup",
        "train.epochs", "train.steps")  # fmt: skip
# Numbers, and the value at which each is off, which is another program.
NEVER = "never"
NUMBERS: dict[str, Any] = {
    "optim.weight_decay": 0, "optim.momentum": 0, "optim.clip_norm": 0, "optim.sam": 0, "optim.l2_sp": 0,
    "optim.layer_decay": 1, "optim.betas": (), "optim.eps": None, "optim.trust_coefficient": NEVER,
    "train.label_smoothing": 0, "train.focal_gamma": NEVER, "train.mixup": 0, "train.cutmix": 0, "train.ema": 0,
    "train.distill_weight": NEVER, "train.temperature": NEVER, "train.fixmatch_threshold": NEVER,
    "train.fixmatch_weight": NEVER,
}  # fmt: skip
KEY = "numbers"  # in the data set that a step is called with
UPDATES = 2**16  # rates that a step is called with at least: another number of them would be another program


class Number:
    """A number of the config that is an argument of the compiled step, to the code that takes it for a float above 0.

    It is true, for it is not off; it takes the type of the array that it meets, as a float does.
    """

    def __init__(self, value: jax.Array):
        self.value, self.dtype, self.shape = value, value.dtype, value.shape

    def __bool__(self) -> bool:
        return True

    def __jax_array__(self) -> jax.Array:
        return self.value

    def like(self, other: Any) -> jax.Array:
        """The number in the type of `other`."""
        dtype = getattr(other, "dtype", self.dtype)
        return self.value.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else self.value

    def __add__(self, other: Any) -> Any:
        return self.like(other) + other

    def __mul__(self, other: Any) -> Any:
        return self.like(other) * other

    def __sub__(self, other: Any) -> Any:
        return self.like(other) - other

    def __rsub__(self, other: Any) -> Any:
        return other - self.like(other)

    def __truediv__(self, other: Any) -> Any:
        return self.like(other) / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.like(other)

    def __pow__(self, other: Any) -> Any:
        return self.like(other) ** other

    __radd__, __rmul__ = __add__, __mul__


class Own(NamedTuple):
    """What a step that is being traced takes in the place of what its run has."""

    config: ConfigDict
    rate: Callable[[Any], Any]  # of an update
    ends: tuple[jax.Array, jax.Array]  # as `average.swa` takes them


def is_on(config: ConfigDict, key: str) -> bool:
    """Whether the config has the method that a key of NUMBERS belongs to."""
    return bool(config_module.get(config, key) != NUMBERS[key])


def numbers_of(config: ConfigDict, rates: np.ndarray, every: int) -> dict[str, np.ndarray]:
    """What the step of a run is called with beside its images.

    Args:
      config: of the run.
      rates: [updates] of float32, or of float64: all other numbers get its type.
      every: updates of an epoch.

    Returns:
      Each of NUMBERS, "rates", filled up to a power of two, "key", which all that is drawn derives from, and "ends".
    """
    size = max(UPDATES, 1 << (len(rates) - 1).bit_length())
    return {
        **{key: np.asarray(config_module.get(config, key), rates.dtype) for key in NUMBERS},
        "rates": np.pad(rates, (0, size - len(rates))),
        "key": np.asarray(jax.random.key_data(jax.random.key(config.seed))),
        "ends": np.array([swa_start(len(rates), every, config.train.swa_epochs), every], np.int32),
    }


def taken(config: ConfigDict, numbers: dict[str, Any]) -> Own:
    """The config of a run whose numbers are those that its step is called with, each of NUMBERS that is on a `Number`.

    Its seed is the key.
    """
    own = ConfigDict(config.to_dict(), type_safe=False)
    for key in NUMBERS:
        if is_on(config, key):
            value = numbers[key]
            config_module.put(own, key, tuple(value) if value.ndim else Number(value))
    own.seed = jax.random.wrap_key_data(numbers["key"])
    first, every = numbers["ends"]
    return Own(own, lambda t: numbers["rates"][jnp.asarray(t, jnp.int32)], (first, every))
