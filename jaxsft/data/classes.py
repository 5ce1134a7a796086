"""Classes by name: their order, their numbers, and what to call the labels of an image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxsft.cli import UserError


def in_order(names: Iterable[str], order: str) -> tuple[str, ...]:
    """The names of classes in their order, each once.

    Args:
      order: 'text', as torchvision sorts them, '10' before '2'; or 'numeric', as numbers where all are decimal.
    """
    known = set(names)
    if order == "numeric" and all(name.isascii() and name.isdecimal() for name in known):
        return tuple(sorted(known, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name)))  # '01' before '1'
    return tuple(sorted(known))


def numbered(names: Iterable[str], class_names: Sequence[str], what: str) -> np.ndarray:
    """The number of each name among those of the classes: int32 [N].

    Args:
      what: they are the labels of, for messages.

    Raises:
      UserError: one is not among them.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    return np.array([number_of(name, numbers, what) for name in names], np.int32)


def number_of(name: str, numbers: Mapping[str, int], what: str) -> int:
    """The number of one class. Raises UserError as `numbered`."""
    if name not in numbers:
        raise UserError(f"{what} has the class {name!r}, which 'train' lacks", "remove it or add training images of it")
    return numbers[name]


def multi_hot(rows: Iterable[Iterable[str]], class_names: Sequence[str], what: str) -> np.ndarray:
    """For each image, of any number of classes, 1 at those that it is of and else 0: uint8 [N, K].

    Args:
      rows: the names of its classes, of each image.
      what: they are the labels of, for messages.

    Raises:
      UserError: one is not among `class_names`.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    found = [[number_of(name, numbers, what) for name in names] for names in rows]
    labels = np.zeros((len(found), len(class_names)), np.uint8)
    for row, several in zip(labels, found, strict=True):
        row[several] = 1
    return labels


def said(label: np.ndarray, class_names: Sequence[str]) -> str:
    """What to call an image's label, the number of its class, or its labels, 0 and 1 [K]; without any '-'."""
    if np.ndim(label) == 0:
        return class_names[int(label)]
    return ", ".join(class_names[k] for k in np.flatnonzero(label).tolist()) or "-"
