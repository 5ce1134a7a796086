"""Classes by name: their order, and their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    found = []
    for name in names:
        number = numbers.get(name)
        if number is None:
            raise UserError(
                f"{what} has the class {name!r}, which 'train' lacks", "remove it or add training images of it"
            )
        found.append(number)
    return np.array(found, np.int32)
