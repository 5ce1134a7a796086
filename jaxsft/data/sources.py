"""Labelled images by name, and the registry of where they can come from.

    tfds:NAME[/CONFIG][:VERSION]   TFDS, without TensorFlow          folder:PATH   torchvision's ImageFolder layout
    hf:NAME[:CONFIG]               Hugging Face's `datasets`         csv:FILE      a table: path,label[,split]
    packed:DIR                     what jaxsft.data.pack wrote       sample        the embedded images

A config file adds its own with `register`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxsft import cli
from jaxsft.cli import UserError, nearest
from jaxsft.data import decode, listing
from jaxsft.data.base import Options, Source, changed
from jaxsft.data.embedded import open_sample
from jaxsft.data.folder import open_folder
from jaxsft.data.hub import open_hub
from jaxsft.data.packed import open_packed
from jaxsft.data.reading import in_memory
from jaxsft.data.splits import subset
from jaxsft.data.table import open_csv
from jaxsft.data.tfds import open_tfds
from jaxsft.models.rows import names_of

MOST_NAMED = 5  # classes in a message
Opener = Callable[[str, str, Options], Source]  # (what follows the colon, the split as written, options)

SOURCES: dict[str, Opener] = {
    "tfds": open_tfds,
    "folder": open_folder,
    "csv": open_csv,
    "hf": open_hub,
    "packed": open_packed,
    "sample": open_sample,
}


def register(kind: str, opener: Opener) -> None:
    """Let `data.source="KIND:NAME"` be opened by `opener(NAME, split, options)`; for config files and programs.

    `opener` returns a `base.Source`, such as `base.Arrays` for images in memory. The split '' stands for the one to
    evaluate on.
    """
    SOURCES[kind] = opener


def open_source(spec: str, split: str, options: Options = Options()) -> Source:  # noqa: B008  (it is frozen)
    """Open a split of a data set.

    Args:
      spec: 'KIND:NAME' or 'KIND', of SOURCES.
      split: as TFDS writes it: 'train', 'train[:5000]', 'train[90%:]', 'train[:10]+test'; '': the one to evaluate on,
        the first of validation, val, valid and test that the data has.
      options: of the config.

    Raises:
      UserError: unknown source or split, a set that is not prepared and can't be, an empty split, broken images, a
        label that no class has.
    """
    kind, _, name = spec.partition(":")
    if kind not in SOURCES:
        raise UserError(f"unknown data source {spec!r}", nearest(kind, [*SOURCES]))
    source = SOURCES[kind](name, split, options)
    if not source.split:  # one of a config file
        source = changed(source, split=split)
    if not len(source):
        why = f"has no image that can be read, such as {': '.join(source.bad[0])}" if source.bad else "is empty"
        raise UserError(f"split {source.split!r} of {spec} {why}", "name another slice")
    check_labels(source, spec)
    return source


def check_labels(source: Source, spec: str) -> None:
    """Raise a UserError where a label is no number of a class, or of several labels neither 0 nor 1."""
    labels, classes = np.asarray(source.labels), len(source.class_names)
    if labels.ndim == 2:
        if labels.dtype != np.uint8 or labels.shape[1] != classes or labels.max(initial=0) > 1:
            what = f"the labels of {spec} are {labels.dtype} {list(labels.shape)}, up to {labels.max(initial=0)}"
            raise UserError(what, f"of several an image they must be uint8 [N, {classes}], 0 and 1")
        return
    if labels.dtype.kind not in "iu":
        raise UserError(f"the labels of {spec} are {labels.dtype}", "they must be int32, numbers of classes")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"{spec}: {source.name(first)} has the label {labels[first]}, which is none of its {classes} classes"
            f" ({len(wrong)} of {len(labels)} have such labels)",
            "mend the labels, or name another split",
        )


def open_splits(config: Any) -> tuple[Source, Source]:
    """What a run trains on, cut down as `data.fraction` and `data.per_class` say, and what it is evaluated on.

    Their classes are numbered as the training split has them, or where model.classes names the outputs, as it does;
    of these some may be without images.

    Raises:
      UserError: as `open_source`; a class to be evaluated that is not trained, or one that is no output.
    """
    data, options = config.data, Options.of(config)
    listing.forget()
    train = open_source(data.source, data.train_split, options)
    evaluated = open_source(data.source, data.eval_split, options)
    train = of_outputs(train, config)
    evaluated = with_classes(evaluated, train.class_names, f"the eval split of {data.source}", "the train split")
    if data.check_overlap:
        warn_of_overlap(train, evaluated)
    return in_memory(cut_down(train, config), options), in_memory(evaluated, options)


def open_training(config: Any) -> Source:
    """What a run trains on, as `open_splits`, for what never looks at the split to evaluate on.

    Raises:
      UserError: as `open_source`; a class that is no output.
    """
    options = Options.of(config)
    listing.forget()
    train = of_outputs(open_source(config.data.source, config.data.train_split, options), config)
    return in_memory(cut_down(train, config), options)


def of_outputs(train: Source, config: Any) -> Source:
    """A training split whose classes are numbered as model.classes names the outputs, where it does."""
    outputs = names_of(config.model.classes)
    what = f"the train split of {config.data.source}"
    return with_classes(train, outputs, what, "config.model.classes") if outputs else train


def cut_down(train: Source, config: Any) -> Source:
    """What `data.fraction` and `data.per_class` leave of a training split."""
    data = config.data
    if data.fraction == 1 and data.per_class is None:
        return train
    return train.select(subset(train.labels, data.fraction, data.per_class, config.seed))


def open_unlabelled(config: Any) -> Source | None:
    """The images of data.unlabelled, whose labels mean nothing; None where there are none to be.

    Raises:
      UserError: as `open_source`.
    """
    data = config.data
    if not data.unlabelled:
        return None
    options = dataclasses.replace(Options.of(config), labelled=False)
    return in_memory(open_source(data.unlabelled, data.unlabelled_split, options), options)


def with_classes(source: Source, class_names: Sequence[str], what: str, whose: str) -> Source:
    """`source` with its classes numbered as in `class_names`.

    Raises:
      UserError: it has images of a class that is not among them.
    """
    if source.class_names == tuple(class_names):
        return source
    numbers = {name: number for number, name in enumerate(class_names)}
    occurring = np.flatnonzero(source.labels.any(0)) if source.multi_label else np.unique(source.labels)
    foreign = [source.class_names[i] for i in occurring if source.class_names[i] not in numbers]
    if foreign:
        names = ", ".join(map(repr, foreign[:MOST_NAMED])) + ", ..." * (len(foreign) > MOST_NAMED)
        classes, them = ("class", "it") if len(foreign) == 1 else ("classes", "them")
        raise UserError(
            f"{what} has the {classes} {names}, which {whose} lacks", f"leave {them} out or train on {them} too"
        )
    table = np.array([numbers.get(name, -1) for name in source.class_names], np.int32)
    if source.multi_label:
        labels = np.zeros((len(source), len(class_names)), np.uint8)
        labels[:, table[occurring]] = source.labels[:, occurring]
        return source.relabelled(labels, class_names)
    return source.relabelled(table[source.labels], class_names)


def hashes(source: Source) -> Iterator[str]:
    """A hash of each image's decoded pixels; '' where it is broken."""
    for index in range(len(source)):
        try:
            pixels = np.asarray(source[index])
        except decode.Unreadable:
            yield ""
            continue
        yield hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def overlap(train: Source, evaluated: Source) -> list[tuple[int, int]]:
    """Pairs (index to train on, index to evaluate on) of images that have the same pixels."""
    seen = {value: index for index, value in enumerate(hashes(train)) if value}
    return [(seen[value], index) for index, value in enumerate(hashes(evaluated)) if value in seen]


def warn_of_overlap(train: Source, evaluated: Source) -> None:
    """Say on stderr how many images are both trained and evaluated on."""
    pairs = overlap(train, evaluated)
    if pairs:
        first, second = train.name(pairs[0][0]), evaluated.name(pairs[0][1])
        cli.warn(
            f"{len(pairs)} of {len(evaluated)} images to evaluate on are also trained on, such as {second} (= {first})"
        )
