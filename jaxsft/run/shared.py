"""What several runs in one process have in common: a set on the devices, and the compiled steps.

A step that is compiled for one run holds its rate, its weight decay and so on as constants, and the next run, of other
numbers, would be compiled anew, for longer than a small one takes. Here such numbers are an argument of the step: they
come with the data set. The rate comes as that of every update, whatever its schedule. So runs that differ in RATE and
NUMBERS alone, or in nothing of a program (ELSEWHERE), share one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxsft import config as config_module
from jaxsft.config import FREE
from jaxsft.data.base import Arrays
from jaxsft.data.loader import on_devices
from jaxsft.run.parallel import DataParallel

RATE = ("optim.lr", "optim.lr_scaling", "optim.schedule", "optim.schedule_by", "optim.warmup_epochs",
        "optim.warmup_steps", "optim.step_epochs", "optim.step_factor", "optim.power", "optim.onecycle_warmup",
        "train.epochs", "train.steps")  # fmt: skip
# At 0 these are off, which is another program.
NUMBERS = ("optim.weight_decay", "optim.momentum", "optim.clip_norm", "train.label_smoothing", "train.mixup",
           "train.cutmix", "train.ema")  # fmt: skip
ELSEWHERE = (*FREE, "data.source", "data.train_split", "data.eval_split", "data.eval_fraction", "data.fraction",
             "data.per_class", "data.sampling", "data.resident_mb", "model.weights", "model.checkpoint")  # fmt: skip
KEY = "numbers"  # in the data set that a step is called with
UPDATES = 2**16  # rates that a step is called with at least: another number of them would be another program

Step = Callable[..., Any]


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


class Shared:
    """The steps and data sets of the runs of a process that have been made so far."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was called for `key`, the first time."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def dataset(self, source: Arrays, parallel: DataParallel) -> dict[str, jax.Array]:
        """A set on all devices, once."""
        # The source is kept with it: another one could get its id.
        _, dataset = self.once((id(source), devices_key(parallel)), lambda: (source, on_devices(source, parallel)))
        return dataset


def devices_key(parallel: DataParallel) -> Hashable:
    """What distinguishes sets of devices."""
    return parallel.backend, parallel.matmul_precision, tuple(map(str, parallel.devices))


def program_key(config: ConfigDict) -> str:
    """The part of a config that decides which program its steps are."""
    flat = config_module.flatten(json.loads(config_module.to_json(config)))
    kept = {key: value for key, value in flat.items() if key not in RATE and not key.startswith(ELSEWHERE)}
    return json.dumps({key: bool(value) if key in NUMBERS else value for key, value in kept.items()}, sort_keys=True)


def numbers_of(config: ConfigDict, rates: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers of a run that its step is called with, `rates` [updates] filled up to a power of two."""
    size = max(UPDATES, 1 << (len(rates) - 1).bit_length())
    numbers = {key: np.asarray(config_module.get(config, key), rates.dtype) for key in NUMBERS}
    return {**numbers, "rates": np.pad(rates, (0, size - len(rates)))}


def taking_numbers(config: ConfigDict, make: Callable[[ConfigDict, Callable[[Any], Any]], Step]) -> Step:
    """The body of a step that takes its numbers from the data set that it is called with, beside the images.

    Args:
      config: of the run.
      make: from a config and the rate of an update the body of the step; to it those of NUMBERS that are not 0 are each
        a `Number`.
    """

    def step(state: Any, dataset: dict[str, Any], batch: Any) -> Any:
        rest = dict(dataset)
        numbers = rest.pop(KEY)
        own = ConfigDict(config.to_dict(), type_safe=False)
        for key in NUMBERS:
            if config_module.get(config, key):
                config_module.put(own, key, Number(numbers[key]))
        return make(own, lambda t: numbers["rates"][jnp.asarray(t, jnp.int32)])(state, rest, batch)

    return step
