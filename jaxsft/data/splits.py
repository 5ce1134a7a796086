"""Parts of a data set: split names with slices, a seeded division into two, subsets for low-data work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from jaxsft.cli import UserError
from jaxsft.data.base import Options

# How splits are written, whatever the case, and which one is meant; '' as the eval split is the first here that the
# data has and that is not for training.
SPELLINGS = {
    "train": "train",
    "training": "train",
    "validation": "val",
    "val": "val",
    "valid": "val",
    "test": "test",
    "testing": "test",
}
TERM = re.compile(r"\s*([^\[\]]*[^\[\]\s])\s*(?:\[\s*(-?[\d_.]*%?)\s*:\s*(-?[\d_.]*%?)\s*\])?\s*")


def canonical(name: str) -> str:
    """'train', 'val' or 'test' for any spelling of one of them, else ''."""
    return SPELLINGS.get(name.casefold(), "")


def eval_split(names: Iterable[str]) -> str:
    """What '' stands for among `names`: the first to evaluate on, or 'all' of data that is not divided; else ''."""
    spelt = {name.casefold(): name for name in names}
    known = [*(spelling for spelling, split in SPELLINGS.items() if split != "train"), "all"]
    return next((spelt[spelling] for spelling in known if spelling in spelt), "")


def same_split(name: str, other: str) -> bool:
    """Whether these are spellings of one split, such as 'val' and 'Validation'."""
    return name == other or (bool(canonical(name)) and canonical(name) == canonical(other))


def asks_for(split: str, name: str) -> bool:
    """Whether `split` has the split `name` among its parts."""
    return any(same_split(name, term.partition("[")[0].strip()) for term in split.split("+"))


def check_spellings(names: Iterable[str], what: str) -> None:
    """Raise a UserError where two of `names` are spellings of one split."""
    spelt: dict[str, str] = {}
    for name in filter(canonical, names):
        first = spelt.setdefault(canonical(name), name)
        if first != name:
            raise UserError(f"{what} has two splits of one name, {first!r} and {name!r}", "keep one, or rename one")


def terms(split: str, names: Iterable[str], what: str) -> list[tuple[str, str, str]]:
    """`split` as (name as the data calls it, where its slice starts, where it ends); '' where that is not said."""
    names = list(names)
    known = f"known: {', '.join(names)}, with slices"
    split = split.strip() or eval_split(names)
    if not split:
        raise UserError(f"{what} has no split to evaluate on", f"name one with --config.data.eval_split; {known}")
    found = []
    for term in split.split("+"):
        match = TERM.fullmatch(term)
        if match is None:
            raise UserError(f"{what} has no split {term!r}: it is not written as train[:500] is", known)
        name, start, end = match[1], match[2] or "", match[3] or ""
        same = [name] if name in names else [other for other in names if same_split(name, other)]
        if name == "all" and not same and not start + end:
            same = names
        elif len(same) != 1:
            raise UserError(f"{what} has no split {name!r}: it has {', '.join(names)}", "name one of them, with slices")
        found += [(other, start, end) for other in same]
    return found


def resolved(split: str, names: Iterable[str], what: str) -> str:
    """`split` in the data's own words: '' is the one to evaluate on, 'val[:5]' may be 'Validation[:5]'.

    Raises:
      UserError: as `slices`.
    """
    parts = terms(split, names, what)
    return "+".join(f"{name}[{start}:{end}]" if start + end else name for name, start, end in parts)


def slices(split: str, sizes: Mapping[str, int], what: str) -> list[tuple[str, int, int]]:
    """`split` as parts (name, from, to) of splits of the given sizes.

    Args:
      split: as TFDS writes it: 'train', 'train[:5000]', 'train[90%:]', 'train[:10]+test'; '' is the one to evaluate on,
        'all' is all of them. Names are found in any of their SPELLINGS.
      sizes: how many examples each split has.
      what: the data's name, for messages.

    Raises:
      UserError: it does not parse, names a split that `sizes` lacks, or more examples than there are.
    """
    parts = []
    for name, start, end in terms(split, sizes, what):
        size, percent = sizes[name], "%" in start + end  # said of one edge, it holds for both
        try:
            first, last = position(start, size, percent) if start else 0, position(end, size, percent) if end else size
        except ValueError:
            first, last = 1, 0
        if not 0 <= first <= last <= size:
            raise UserError(f"{what} has no split {split!r}: {name} has {size} examples", "name another slice of them")
        parts.append((name, first, last))
    return parts


def position(edge: str, size: int, percent: bool) -> int:
    """An edge of a slice as a number of examples from the start; a share of them is rounded."""
    number = round(float(edge.removesuffix("%")) * size / 100) if percent else int(edge)
    return number + size if edge.startswith("-") else number


def strata(labels: np.ndarray) -> np.ndarray:
    """What images are divided by: int [N], their class; of several labels the one that the fewest images have.

    Of labels that equally many have the first counts. An image without any is of a class of its own kind, number K.

    Args:
      labels: of one class each [N], of any type that sorts; of any number of labels 0 and 1 [N, K].
    """
    if labels.ndim == 1:
        return np.unique(labels, return_inverse=True)[1]
    frequency = np.where(labels > 0, labels.sum(0, dtype=np.int64), len(labels) + 1)
    return np.where(labels.any(1), frequency.argmin(1), labels.shape[1])


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


def folds(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The fold, 0 .. count - 1, of each image: int [N]; each class is dealt out over all folds like cards.

    Of a class no fold has more than one image more than another, and so it is of all images, as of scikit-learn's
    StratifiedKFold.

    Args:
      labels: int [N].
      count: how many folds.
      seed: of who comes into which.
    """
    members = [shuffled(np.flatnonzero(labels == label), seed, int(label)) for label in np.unique(labels)]
    fold = np.empty(len(labels), np.intp)
    fold[np.concatenate(members)] = np.arange(len(labels)) % count
    return fold


def partition(labels: np.ndarray, options: Options, what: str, own: str = "") -> dict[str, np.ndarray]:
    """Data without a split to evaluate on as splits: name -> indices, sorted.

    'train' and 'val', of every class `options.eval_fraction`; or, not to be divided, the whole as 'all'.

    Args:
      labels: as for `strata`.
      options: of the config.
      what: the data's name, for messages.
      own: the name that the data has for its one part, by which the whole is known too.

    Raises:
      UserError: every class has a single image.
    """
    if not options.divide:
        return dict.fromkeys(["all", *filter(None, [own])], np.arange(len(labels)))
    train, held_out = divided(strata(labels), options.eval_fraction, options.seed)
    if len(labels) and not len(held_out):
        raise UserError(
            f"{what} has a single image of each class: nothing is left to evaluate on",
            "add images, or a split 'val' of other images",
        )
    return {"train": train, "val": held_out}


def subset(labels: np.ndarray, fraction: float, per_class: int | None, seed: int) -> np.ndarray:
    """Sorted indices of a part of a set, chosen class by class.

    Smaller parts of the same seed are contained in larger ones, so that learning curves are made of nested sets.

    Args:
      labels: int [N]; or 0 and 1 [N, K]: an image counts among those of its rarest label (see `strata`).
      fraction: of every class, rounded, at least one image.
      per_class: not None: as many of every class, or all where it has fewer.
      seed: of the choice.
    """
    labels = labels if labels.ndim == 1 else strata(labels)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(round(fraction * len(members)), 1) if per_class is None else per_class
        chosen.append(shuffled(members, seed, int(label))[:count])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.intp)


def shuffled(members: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """`members` in an order that is a pure function of (seed, stream)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64))).permutation(members)
