"""What a config makes of every parameter, for people, without data and weights."""

from __future__ import annotations

from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from jaxsft.learn import trainable
from jaxsft.learn.schedule import peak_lr
from jaxsft.models.initial import checked_shapes, make_model


def lines(config: ConfigDict) -> list[str]:
    """The table of `trainable.table` in aligned columns, below their names.

    How many classes there are only the data knows, if model.num_classes does not say it: "?" stands for it. A head that
    may be replaced is taken to be.

    Raises:
      UserError: as `trainable.rules`, or the network can't take images of that size.
    """
    given = config.model.num_classes
    shapes, others = (parameter_shapes(config, given or count) for count in (2, 3))
    of_head = {path for path in shapes if path.startswith(f"{trainable.head_of(config)}/")}
    fresh = () if config.model.head == "keep" else of_head
    rules = trainable.rules(config, traverse_util.unflatten_dict(shapes, sep="/"), fresh)
    rows: list[tuple[str, ...]] = [trainable.COLUMNS]
    for path, _, *rest in trainable.table(rules, peak_lr(config)):
        sides = zip(shapes[path].shape, others[path].shape, strict=True)
        rows.append((path, "x".join(str(one) if one == other else "?" for one, other in sides), *rest))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def parameter_shapes(config: ConfigDict, num_classes: int) -> dict[str, Any]:
    """By path the shapes of the parameters."""
    shapes = checked_shapes(make_model(config, num_classes), config.data.image_size)
    return traverse_util.flatten_dict(shapes["params"], sep="/")
