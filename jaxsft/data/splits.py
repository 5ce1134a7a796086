"""Parts of a data set: split names with slices, a seeded division into two, subsets for low-data work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from jaxsft.cli import UserError

# What '' as the eval split stands for: the first of these that the data has.
EVAL_SPLITS = ("validation", "val", "valid", "test")


def eval_split(names: Iterable[str]) -> str:
    """The first of EVAL_SPLITS among `names`; '' where there is none."""
    known = set(names)
    return next((name for name in EVAL_SPLITS if name in known), "")


def slices(split: str, sizes: Mapping[str, int], what: str) -> list[tuple[str, int, int]]:
    """`split` as parts (name, from, to) of splits of the given sizes.

    Args:
      split: as TFDS writes it: 'train', 'train[:5000]', 'train[90%:]', 'train[:10]+test'; '' is the one to evaluate on.
      sizes: how many examples each split has.
      what: the data's name, for messages.

    Raises:
      UserError: it does not parse, or names a split that `sizes` lacks.
    """
    import tensorflow_datasets as tfds

    known = f"known: {', '.join(sizes)}, with slices"
    split = split or eval_split(sizes)
    if not split:
        raise UserError(f"{what} has no split to evaluate on", f"name one with --config.data.eval_split; {known}")
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0, filename_template=None)
        for name, size in sizes.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{what} has no split {split!r}: {reason}", known) from None
    return [
        (p.splitname, p.from_ or 0, sizes[p.splitname] if p.to is None else min(p.to, sizes[p.splitname]))
        for p in parts
    ]


def divided(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and to evaluate on, each sorted: of every class `fraction` (rounded) go to the second.

    A class of two or more images is in both parts, one of a single image in the first.

    Args:
      labels: int [N].
      fraction: above 0, below 1.
      seed: of the choice.
    """
    held = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held.append(shuffled(members, seed, int(label))[:count])
    held_out = np.sort(np.concatenate(held)) if held else np.empty(0, np.intp)
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def subset(labels: np.ndarray, fraction: float, per_class: int | None, seed: int) -> np.ndarray:
    """Sorted indices of a part of a set, chosen class by class.

    Smaller parts of the same seed are contained in larger ones, so that learning curves are made of nested sets.

    Args:
      labels: int [N].
      fraction: of every class, rounded, at least one image.
      per_class: not None: as many of every class, or all where it has fewer.
      seed: of the choice.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(round(fraction * len(members)), 1) if per_class is None else per_class
        chosen.append(shuffled(members, seed, int(label))[:count])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.intp)


def shuffled(members: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """`members` in an order that is a pure function of (seed, stream)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64))).permutation(members)
