"""The run that teaches another: its network, its variables, and which of its outputs is which of the other's."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from jaxsft import storage
from jaxsft.cli import UserError
from jaxsft.learn.distill import Teacher
from jaxsft.run.saved import load_run


def load_teacher(config: ConfigDict, class_names: tuple[str, ...]) -> tuple[Teacher | None, Any]:
    """The teacher of train.teacher and its variables, the average where it kept one; None and None without a teacher.

    Args:
      config: of the run that is taught.
      class_names: of its data.

    Raises:
      UserError: there is no such run, or it knows other classes.
    """
    train = config.train
    if not train.teacher:
        return None, None
    run = load_run(storage.location(train.teacher))
    theirs, num_classes = run.card.class_names, config.model.num_classes or len(class_names)
    what, what_to_do = f"config.train.teacher {train.teacher}", "name a run on these classes"
    if theirs is None or num_classes != len(class_names):
        if run.card.num_classes != num_classes:
            raise UserError(f"{what} has {run.card.num_classes} outputs, not {num_classes}", what_to_do)
        columns = tuple(range(num_classes))
    else:
        if lacking := [name for name in class_names if name not in theirs]:
            raise UserError(f"{what} does not know the class {lacking[0]!r}", what_to_do)
        if odd := [name for name in theirs if name not in class_names]:
            raise UserError(f"{what} has the class {odd[0]!r}, which the data lack", what_to_do)
        columns = tuple(map(theirs.index, class_names))
    independent = run.card.multi_label or train.loss == "bce"
    return Teacher(run.model, run.card.preprocessing, columns, independent=independent), run.variables
