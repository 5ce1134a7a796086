"""What a run was trained on, in a few lines of JSON, so that a resumed one notices that it is something else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsft.data.base import Arrays, Source

MOST_IMAGES = 1000  # of an array whose pixels are looked at


def fingerprint(train: Source, evaluated: Source, unlabelled: Source | None = None) -> dict[str, Any]:
    """{"classes": [names in their order], "train": {"images", "sha256"}, "eval": {...}}, and perhaps "unlabelled".

    The sha256 is of the list of names and labels as it was found, before broken images were left out: one that breaks
    later, and is left out then, does not make it another set. Of a source without a list it is of the labels and, where
    it is an array, of up to MOST_IMAGES of its images.
    """
    parts = {"train": train, "eval": evaluated} | ({"unlabelled": unlabelled} if unlabelled else {})
    return {
        "classes": list(train.class_names),
        **{name: {"images": len(part) + len(part.bad), "sha256": digest(part)} for name, part in parts.items()},
    }


def digest(source: Source) -> str:
    """The sha256 of what `source` consists of."""
    if source.listing:
        return source.listing
    found = hashlib.sha256(np.asarray(source.labels, np.int32).tobytes())
    if isinstance(source, Arrays):
        step = -(-len(source) // MOST_IMAGES) or 1
        found.update(source.images[::step].tobytes())
    return found.hexdigest()


def difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """In words what distinguishes the data that a run began with from those found now; '' where nothing does."""
    if there.get("classes") != here["classes"]:
        return "other classes: " + classes_difference(there.get("classes") or (), here["classes"])
    for part in (name for name in here if name != "classes"):
        before, now = there.get(part) or {}, here[part]
        if before.get("sha256") == now["sha256"]:
            continue
        if before.get("images") != now["images"]:
            return f"{before.get('images')} images in its {part} split there, {now['images']} here"
        return f"the {now['images']} images of its {part} split have other names or labels, or another order"
    return ""


def classes_difference(there: Sequence[str], here: Sequence[str]) -> str:
    """Which classes are gone or new, or where their order differs."""
    gone, new = [n for n in there if n not in here], [n for n in here if n not in there]
    if not gone and not new:
        place = next(i for i, pair in enumerate(zip(there, here, strict=True)) if pair[0] != pair[1])
        return f"output {place} is {there[place]!r} there, {here[place]!r} here"
    parts = (("no longer", gone), ("newly", new))
    return ", ".join(f"{word} {', '.join(map(repr, names[:5]))}" for word, names in parts if names)
