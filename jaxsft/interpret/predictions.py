"""What a model takes every example for, as a table in a file: CSV or Parquet, a row an image, as pandas reads them.

Rows are written as they come, so that memory does not grow with the images.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsft import storage
from jaxsft.cli import UserError
from jaxsft.data.base import Source
from jaxsft.interpret.metrics import UNRANKED
from jaxsft.storage import Location

SUFFIXES = (".csv", ".parquet")
BEST = 5  # classes that have columns of their own in each row
MOST_COLUMNS = 100  # classes, up to which each has a column of its probability
AT_ONCE = 8192  # rows of a Parquet row group
BETWEEN = "|"  # the labels of an image with several
Columns = dict[str, np.ndarray | list[str | None]]
Write = Callable[[Columns], None]


def predictions_to(file: str) -> Location | None:
    """Argparse's `type` for --predictions, whose default is '': where the table goes.

    Raises:
      UserError: it ends in none of SUFFIXES, can't be written, or pyarrow is missing; found now, not after the work.
    """
    if not file:
        return None
    path = storage.location(file)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is no name of a table", f"let it end in {' or '.join(SUFFIXES)}")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401  (an extra)
        except ImportError:
            raise UserError("pyarrow is not installed", "pip install 'jaxsft[parquet]'") from None
    storage.check_writable(path)
    return path


def top_of(num_classes: int) -> int:
    """How many classes the step must name of each example: all where each has a column."""
    return num_classes if num_classes <= MOST_COLUMNS else BEST


@contextlib.contextmanager
def table(path: Location, source: Source, class_names: Sequence[str]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What writes a batch of `make_eval_step`'s answers, on the host, into a table that then takes the place of `path`.

    The columns of one label an image: file (as `Source.name` says), label, predicted, correct, probability (of what is
    predicted), rank (0: right; else how many classes come before the label), loss; class_1, probability_1 and so on,
    the five most probable; and of up to 100 classes p_CLASS, the probability of each. Of several labels an image: file,
    label and predicted (their names, "|" between them), correct (all of them), loss, p_CLASS as above. A row with a NaN
    has no prediction and no probabilities. In names what is no UTF-8 is an escape, \\udcff for the byte 0xff.

    Args:
      path: of a name that `predictions_to` takes.
      source: what the numbers of examples are of.
      class_names: of the model's outputs.

    Raises:
      UserError: it can't be written.
    """
    opened = as_parquet if path.suffix.lower() == ".parquet" else as_csv
    names = [utf8(name) for name in class_names]

    def write(batch: Mapping[str, Any]) -> None:
        mask = np.asarray(batch["mask"])
        rows = {name: np.asarray(value)[mask] for name, value in batch.items() if name != "mask"}
        files: list[str | None] = [utf8(source.name(int(number))) for number in rows["example"]]
        several = rows["label"].ndim == 2
        append({"file": files, **(of_several_labels if several else of_one_label)(rows, names)})

    with storage.writing(path) as target, storage.replacing(target) as partial, opened(partial) as append:
        yield write


def of_one_label(rows: Mapping[str, np.ndarray], names: Sequence[str]) -> Columns:
    """The columns but the first, from `metrics.answer`'s arrays [N]."""
    predicted, ranked = rows["predicted"], rows["predicted"] != UNRANKED
    columns: Columns = {
        "label": [names[k] for k in rows["label"].tolist()],
        "predicted": [names[k] if k != UNRANKED else None for k in predicted.tolist()],
        "correct": rows["rank"] == 0,
        "probability": np.where(ranked, rows["probability"], np.nan),
        "rank": rows["rank"],
        "loss": rows["loss"],
    }
    classes, probabilities = rows["classes"], np.where(ranked[:, None], rows["probabilities"], np.nan)
    for place in range(min(BEST, len(names))):
        of_place = zip(classes[:, place].tolist(), ranked, strict=True)
        columns[f"class_{place + 1}"] = [names[k] if known else None for k, known in of_place]
        columns[f"probability_{place + 1}"] = probabilities[:, place]
    if len(names) <= MOST_COLUMNS:
        by_class = np.take_along_axis(probabilities, np.argsort(classes, axis=1), axis=1)
        columns |= {f"p_{name}": by_class[:, k] for k, name in enumerate(names)}
    return columns


def of_several_labels(rows: Mapping[str, np.ndarray], names: Sequence[str]) -> Columns:
    """The columns but the first, from `multilabel.answer`'s arrays [N, K]."""
    broken = np.isnan(rows["probabilities"]).any(1)
    label, predicted = (
        [BETWEEN.join(names[k] for k in np.flatnonzero(row).tolist()) for row in rows[name]]
        for name in ("label", "predicted")
    )
    columns: Columns = {
        "label": list(label),
        "predicted": [None if is_broken else said for said, is_broken in zip(predicted, broken, strict=True)],
        "correct": (rows["label"] == rows["predicted"]).all(1) & ~broken,
        "loss": rows["loss"],
    }
    if len(names) <= MOST_COLUMNS:
        columns |= {f"p_{name}": rows["probabilities"][:, k] for k, name in enumerate(names)}
    return columns


@contextlib.contextmanager
def as_csv(path: Path) -> Iterator[Write]:
    """What appends columns to a CSV file: a header, quotes where a cell needs them, nothing for what is not known."""
    is_empty = True
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")

        def append(columns: Columns) -> None:
            nonlocal is_empty
            if is_empty:
                out.writerow(columns)
            is_empty = False
            cells = [column if isinstance(column, list) else cells_of(column) for column in columns.values()]
            out.writerows(zip(*cells, strict=True))

        yield append


def cells_of(column: np.ndarray) -> list[str]:
    """Numbers as text: of floats the shortest that reads back as the same, of a NaN none."""
    if column.dtype.kind != "f":
        return column.astype(str).tolist()
    return np.where(np.isnan(column), "", column.astype(np.float32).astype(str)).tolist()


@contextlib.contextmanager
def as_parquet(path: Path) -> Iterator[Write]:
    """What appends columns to a Parquet file, some thousand rows at a time; a NaN is null, floats have 32 bits."""
    import pyarrow as pa
    from pyarrow import parquet

    kept: list[Any] = []
    writer: Any = None

    def flush() -> None:
        nonlocal writer
        if kept:
            whole = pa.concat_tables(kept).combine_chunks()
            kept.clear()
            writer = writer or parquet.ParquetWriter(path, whole.schema)
            writer.write_table(whole)

    def append(columns: Columns) -> None:
        arrays = {name: as_arrow(column, pa) for name, column in columns.items()}
        kept.append(pa.table(arrays))
        if sum(map(len, kept)) >= AT_ONCE:
            flush()

    try:
        yield append
        flush()
    finally:
        if writer is not None:
            writer.close()


def as_arrow(column: np.ndarray | list[str | None], pa: Any) -> Any:
    """A column as an array of pyarrow's, of a type that does not depend on what is in it."""
    if isinstance(column, list):
        return pa.array(column, pa.string())
    if column.dtype.kind != "f":
        return pa.array(column)
    return pa.array(column.astype(np.float32), from_pandas=True)


def utf8(text: str) -> str:
    """A name as any program reads it: what in a file's name is no UTF-8 becomes an escape."""
    return text.encode("utf-8", "backslashreplace").decode()
