"""What several runs in one process have in common: a set on the devices, the initial model, and the compiled steps.

Runs that differ in their numbers alone (see `numbers`), or in nothing of a program (ELSEWHERE), share one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxsft import config as config_module
from jaxsft.config import FREE
from jaxsft.data.base import Arrays
from jaxsft.data.loader import on_devices
from jaxsft.learn import trainable
from jaxsft.run.numbers import NUMBERS, RATE, is_on
from jaxsft.run.parallel import BoundedDispatch, DataParallel
from jaxsft.run.program import Phase, Program

ELSEWHERE = (*FREE, "seed", "data.source", "data.train_split", "data.eval_split", "data.eval_fraction", "data.fraction",
             "data.per_class", "data.sampling", "data.resident_mb", "model.weights", "model.checkpoint")  # fmt: skip

Step = Callable[..., Any]


class Shared:
    """The steps, data sets and initial models of the runs of a process that have been made so far."""

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

    def initial(
        self, config: ConfigDict, class_names: tuple[str, ...], parallel: DataParallel, make: Callable[[], Any]
    ) -> Any:
        """What `make` makes of the model, its variables and so on, once: the variables on the host."""
        weights = config.model.weights, config.model.checkpoint, config.seed
        key = "initial", program_key(config), *weights, class_names, devices_key(parallel)

        def kept() -> Any:
            model, variables, *rest = make()
            return model, jax.device_get(variables), *rest  # a step donates the devices' memory

        return self.once(key, kept)

    def program(self, **fields: Any) -> SharedProgram:
        """The program of a run, whose steps those of earlier ones are where they can be."""
        return SharedProgram(**fields, shared=self)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SharedProgram(Program):
    """A program whose steps are compiled once for all that differ in their numbers alone."""

    shared: Shared

    @property
    def key(self) -> Hashable:
        """What distinguishes steps that are compiled each for itself."""
        weights = tuple(self.class_weights or ())
        left = self.left, self.to_evaluate, self.of_unlabelled
        shapes = json.dumps({path: rule.shape for path, rule in self.rules.items()})
        kind, program = type(self.model).__name__, program_key(self.config)
        return kind, program, shapes, left, weights, self.fresh, devices_key(self.parallel)

    def phases(self) -> list[Phase]:
        """See Program."""
        steps = self.shared.once((self.key, "phases"), super().phases)
        starts = trainable.phases(self.rules, self.every, self.total)
        return [Phase(after, *phase[1:]) for (after, _), phase in zip(starts, steps, strict=True)]

    def evaluation(self) -> BoundedDispatch:
        """See Program."""
        return self.shared.once((self.key, "evaluation"), super().evaluation)

    def statistics(self) -> Step | None:
        """See Program."""
        return self.shared.once((self.key, "statistics"), super().statistics)


def devices_key(parallel: DataParallel) -> Hashable:
    """What distinguishes sets of devices."""
    return parallel.backend, parallel.matmul_precision, tuple(map(str, parallel.devices))


def program_key(config: ConfigDict) -> str:
    """The part of a config that decides which program its steps are."""
    flat = config_module.flatten(json.loads(config_module.to_json(config)))
    kept = {key: value for key, value in flat.items() if key not in RATE and not key.startswith(ELSEWHERE)}
    methods = {key: is_on(config, key) if key in NUMBERS else value for key, value in kept.items()}
    return json.dumps(methods, sort_keys=True)
