"""What the value of a setting may be: in words, as in `it must be above 0`, and as the test of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from math import inf
from typing import Any, NamedTuple

LARGEST = 4096  # px, the side of an image


class Allowed(NamedTuple):
    """`text` says what a value must be, `test` whether it is so; `names` are all there are, where it is a name or some.

    `names` is a function, for some are known only to a module that takes a second to import.
    """

    text: str
    test: Callable[[Any], bool]
    names: Callable[[], Iterable[str]] | None = None

    def admits(self, value: Any) -> bool:
        """Whether the value passes the test, which may stumble over a value of another shape."""
        try:
            return bool(self.test(value))
        except (TypeError, ValueError):
            return False

    def known(self) -> list[str]:
        """All names."""
        return list(self.names()) if self.names else []

    def unknown(self, value: Any) -> list[str]:
        """Those names of a value that passes the test, a name or a tuple of such, that there are not."""
        if not self.names:
            return []
        return [name for name in (value if isinstance(value, tuple) else (value,)) if name not in self.known()]


def one_of(*values: str) -> Allowed:
    """One of these texts."""
    *first, last = map(repr, values)
    return Allowed(f"{', '.join(first)} or {last}", lambda v: v in values)


def name_of(names: Callable[[], Iterable[str]]) -> Allowed:
    """One of many names."""
    return Allowed("a name", lambda v: isinstance(v, str), names)


def names_of(names: Callable[[], Iterable[str]]) -> Allowed:
    """No or some of these names."""
    return Allowed("a tuple of names", lambda v: all(isinstance(name, str) for name in v), names)


def at_least(low: float) -> Allowed:
    """A finite number."""
    return Allowed(f"{low} or more", lambda v: low <= v < inf)


def above(low: float, *, at_most: float = inf, below: float = inf) -> Allowed:
    """A finite number."""
    limits = (f"above {low}", f", at most {at_most}" * (at_most < inf), f", below {below}" * (below < inf))
    return Allowed("".join(limits), lambda v: low < v <= at_most and v < below)


def from_to(low: float, high: float) -> Allowed:
    """A number, both ends included."""
    return Allowed(f"{low} to {high}", lambda v: low <= v <= high)


def from_to_below(low: float, high: float) -> Allowed:
    """A number, the upper end excluded."""
    return Allowed(f"{low} to below {high}", lambda v: low <= v < high)


def none_or(allowed: Allowed) -> Allowed:
    """None besides. "1 or more" becomes "None or 1 and more", for "or" twice reads as three things."""
    text = f"None or {allowed.text.replace(' or ', ' and ')}"
    return Allowed(text, lambda v: v is None or allowed.test(v), allowed.names)


def is_pattern(value: Any) -> bool:
    """Whether `value` is a regular expression that compiles."""
    try:
        return isinstance(value, str) and bool(value) and re.compile(value) is not None
    except re.error:
        return False


def is_rgb(value: Any) -> bool:
    """Whether `value` is three finite numbers."""
    return len(value) == 3 and all(isinstance(x, int | float) and abs(x) < inf for x in value)


def is_range(value: Any) -> bool:
    """Whether `value` is two finite numbers above 0 in their order."""
    low, high = value
    return 0 < low <= high < inf


def is_jitter(value: Any) -> bool:
    """Whether `value` is changes of brightness, contrast, saturation and hue."""
    return len(value) == 4 and all(0 <= x < inf for x in value) and value[3] <= 0.5


def is_rand_augment(value: Any) -> bool:
    """Whether `value` is a number of operations and a magnitude."""
    operations, magnitude = value
    return isinstance(operations, int) and 1 <= operations <= 10 and 0 <= magnitude <= 30


def are_weights(value: Any) -> bool:
    """Whether `value` is no or some finite numbers of 0 and more, or ('balanced',)."""
    return value == ("balanced",) or (all(0 <= x < inf for x in value) and (not value or max(value) > 0))


def are_multipliers(value: Any) -> bool:
    """Whether `value` is pairs of a regular expression and a factor of 0 or more."""
    return all(len(pair) == 2 and is_pattern(pair[0]) and 0 <= pair[1] < inf for pair in value)


def are_epochs(value: Any) -> bool:
    """Whether `value` is pairs of a regular expression and an epoch above 0."""
    return all(len(pair) == 2 and is_pattern(pair[0]) and 0 < pair[1] < inf for pair in value)


def are_betas(value: Any) -> bool:
    """Whether `value` is no or two shares below 1."""
    return len(value) in (0, 2) and all(0 <= x < 1 for x in value)


def are_classes(value: Any) -> bool:
    """Whether `value` is no or several names, 'old=new' among them, each old and each new one once."""
    if len(value) == 1 or not all(isinstance(entry, str) for entry in value):
        return False
    pairs = [entry.split("=", 1) if "=" in entry else [entry, entry] for entry in value]
    return all(map(all, pairs)) and all(len(set(names)) == len(pairs) for names in zip(*pairs, strict=True))


ANY = Allowed("", lambda v: True)  # of its type
SEED = Allowed("0 to 2**63 - 1", lambda v: 0 <= v < 2**63)
CHECKPOINT = Allowed("'last', 'best' or a step", lambda v: v in ("last", "best") or v.isdecimal())
PATTERNS = Allowed("a tuple of regular expressions", lambda v: all(is_pattern(p) for p in v))
SOURCE = Allowed("'tfds:NAME', 'folder:PATH', 'csv:FILE', 'hf:NAME', 'packed:DIR' or 'sample'", bool)
SOURCE_OR_NONE = Allowed(f"'' or {SOURCE.text}", lambda v: True)
SPLIT = Allowed("a split such as train[:90%]", bool)
DELIMITER = Allowed("'' or one character, no letter and no digit", lambda v: len(v) < 2 and not v.isalnum())
RESIZE = Allowed(f"None or image_size to {LARGEST}", lambda v: v is None or v <= LARGEST)
SHARES = Allowed("two shares of the area, 0 < low <= high <= 1", lambda v: is_range(v) and v[1] <= 1)
RATIOS = Allowed("two ratios, 0 < low <= high", is_range)
JITTER = Allowed("four numbers of 0 or more, the last at most 0.5", is_jitter)
RAND_AUGMENT = Allowed("two numbers, operations 1 to 10 and magnitude 0 to 30", is_rand_augment)
RGB = Allowed("three numbers", is_rgb)
RGB_ABOVE_0 = Allowed("three numbers above 0", lambda v: is_rgb(v) and min(v) > 0)
CLASS_WEIGHTS = Allowed("numbers of 0 or more, not all 0, or 'balanced'", are_weights)
CLASSES = Allowed("a tuple of two names or more, each once, 'old=new' among them", are_classes)
MULTIPLIERS = Allowed("a tuple of pairs (regular expression, factor of 0 or more)", are_multipliers)
EPOCHS = Allowed("a tuple of pairs (regular expression, epoch above 0)", are_epochs)
BETAS = Allowed("no or two numbers, 0 to below 1", are_betas)
