"""Which examples make up step t: a pure function of (seed, step), the same whatever the number of devices."""

from __future__ import annotations

import dataclasses

import numpy as np


def generator(seed: int, epoch: int) -> np.random.Generator:
    """Random numbers of an epoch. Philox is counter-based: neighbouring keys give independent streams."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch: int32 [size], each of 0 .. size - 1 once."""
    return generator(seed, epoch).permutation(size).astype(np.int32)


def balanced(seed: int, epoch: int, labels: np.ndarray) -> np.ndarray:
    """An epoch in which every class comes equally often: int32 [N], classes with fewer images repeat them.

    No image comes a second time before all of its class have come. Where N is not divisible by the number of classes,
    the classes that get one more are drawn anew in each epoch.
    """
    random = generator(seed, epoch)
    classes = np.unique(labels)
    quotas = np.full(len(classes), len(labels) // len(classes))
    quotas[random.permutation(len(classes))[: len(labels) % len(classes)]] += 1
    drawn = []
    for label, quota in zip(classes, quotas, strict=True):
        members = np.flatnonzero(labels == label)
        rounds = -(-int(quota) // len(members))
        drawn.append(np.concatenate([random.permutation(members) for _ in range(rounds)] or [members[:0]])[:quota])
    return random.permutation(np.concatenate(drawn)).astype(np.int32)


@dataclasses.dataclass
class Order:
    """The batches of a training run.

    `order[t]` is the int32 [batch_size] of example indices of step t (from 0), in any order of asking; the permutation
    of the epoch asked for last is kept.

    Args:
      size: how many examples there are.
      batch_size: global.
      seed: of the run.
      keep_last: whether the last, partial batch of an epoch is trained on, with its own shape, or dropped.
      labels: int [size]; given, the classes are sampled equally often (see `balanced`).
    """

    size: int
    batch_size: int
    seed: int
    keep_last: bool = False
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.steps_per_epoch = -(-self.size // self.batch_size) if self.keep_last else self.size // self.batch_size
        self._epoch = -1
        self._permutation = np.empty(0, np.int32)

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self.epoch(epoch)
        return self._permutation[position * self.batch_size : (position + 1) * self.batch_size]

    def epoch(self, epoch: int) -> np.ndarray:
        """The examples of a whole epoch, in their order: int32 [size]."""
        if self.labels is None:
            return permutation(self.seed, epoch, self.size)
        return balanced(self.seed, epoch, self.labels)
