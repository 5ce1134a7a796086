"""Which examples make up step t: a pure function of (seed, step), the same whatever the number of devices."""

from __future__ import annotations

import numpy as np


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch: int32 [size], each of 0 .. size - 1 once.

    Philox is counter-based: neighbouring (seed, epoch) keys give independent streams.
    """
    key = np.array([seed, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(size).astype(np.int32)


class Order:
    """The batches of a training run; the last, partial batch of an epoch is dropped.

    `Order(...)[t]` is the int32 [batch_size] of example indices of step t, in any order of asking; the permutation of
    the epoch asked for last is kept.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.steps_per_epoch = size // batch_size
        self._epoch = -1
        self._permutation = np.empty(0, np.int32)

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, permutation(self.seed, epoch, self.size)
        return self._permutation[position * self.batch_size : (position + 1) * self.batch_size]


def evaluation_batches(size: int, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every example once, in order: pairs (index int32 [batch_size], mask bool [batch_size]), the last one padded.

    Padding repeats the last example under a False mask, so that all batches have one shape.
    """
    batches = []
    for start in range(0, size, batch_size):
        index = np.arange(start, start + batch_size, dtype=np.int32)
        batches.append((np.minimum(index, size - 1), index < size))
    return batches
