"""Tables of predictions, as pandas reads them; and the table on the screen."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxsft.data.base import Arrays
from jaxsft.interpret import predictions, tables
from jaxsft.interpret.metrics import Evaluation


def batch(rows: int, classes: int, nan: int = -1) -> dict[str, np.ndarray]:
    """What a step says of random examples, the last of which is masked."""
    rng = np.random.default_rng(rows)
    probabilities = rng.dirichlet(np.ones(classes), rows).astype(np.float32)
    order = np.argsort(-probabilities, axis=1)[:, : predictions.top_of(classes)]
    label = rng.integers(0, classes, rows)
    answers = {
        "example": np.arange(rows), "label": label, "predicted": order[:, 0].copy(), "rank": (order[:, 0] != label) * 1,
        "loss": rng.exponential(1, rows).astype(np.float32), "probability": probabilities.max(1), "classes": order,
        "probabilities": np.take_along_axis(probabilities, order, 1), "mask": np.arange(rows) < rows - 1,
    }  # fmt: skip
    if nan >= 0:
        answers["predicted"][nan] = -1
        for name in ("probability", "loss", "probabilities"):
            answers[name][nan] = np.nan
    return answers


def source_of(rows: int) -> Arrays:
    return Arrays(np.zeros((rows, 1, 1, 3), np.uint8), np.zeros(rows, np.int32), ("a",))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("classes", [3, 101])
def test_tables_of_few_and_many_classes(classes: int, suffix: str, tmp_path: Path) -> None:
    """A NaN is nothing, in every column that it is about; a table of several batches is one."""
    names, path = tuple(f"class {k}" for k in range(classes)), tmp_path / f"p.{suffix}"
    with predictions.table(path, source_of(20), names) as write:
        write(batch(20, classes, nan=2))
        write(batch(10, classes))
        assert not path.exists()
    table = pd.read_csv(path) if suffix == "csv" else pd.read_parquet(path)
    assert len(table) == 19 + 9
    of_each = [f"p_{name}" for name in names] if classes == 3 else []
    assert [name for name in table.columns if name.startswith("p_")] == of_each
    assert sum(name.startswith("class_") for name in table.columns) == min(classes, 5)
    unknown = table.columns[table.iloc[2].isna()]
    assert {*unknown} == {*table.columns} - {"file", "label", "correct", "rank"}
    assert not table.drop(index=2).isna().any().any()
    assert table["probability"].dtype == (np.float32 if suffix == "parquet" else np.float64)
    expected = batch(20, classes, nan=2)["probability"][:19]
    np.testing.assert_array_equal(table["probability"][:19].astype(np.float32), expected)


def test_memory_of_a_table_is_that_of_a_part_of_it(tmp_path: Path, monkeypatch) -> None:
    parquet = importlib.import_module("pyarrow.parquet")
    monkeypatch.setattr(predictions, "AT_ONCE", 50)
    with predictions.table(tmp_path / "p.parquet", source_of(20), ("a", "b", "c")) as write:
        for _ in range(9):
            write(batch(20, 3))
    file = parquet.ParquetFile(tmp_path / "p.parquet")
    assert file.metadata.num_rows == 9 * 19
    assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [57, 57, 57]


def test_a_table_that_is_broken_off_is_not_there(tmp_path: Path) -> None:
    def broken_off(path: Path) -> None:
        with predictions.table(path, source_of(20), "abc") as write:
            write(batch(20, 3))
            raise RuntimeError

    for suffix in ("csv", "parquet"):
        with pytest.raises(RuntimeError):
            broken_off(tmp_path / f"p.{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_several_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random((4, 3)).astype(np.float32)
    probabilities[3] = np.nan
    answers = {
        "example": np.arange(4), "label": np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]], np.uint8),
        "predicted": (probabilities > 0.5).astype(np.uint8), "loss": rng.random(4), "probabilities": probabilities,
        "mask": np.ones(4, bool),
    }  # fmt: skip
    with predictions.table(tmp_path / "p.csv", source_of(4), ("ant", "bee", "cow")) as write:
        write(answers)
    with (tmp_path / "p.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "label", "predicted", "correct", "loss", "p_ant", "p_bee", "p_cow"]
    assert [row[1] for row in rows] == ["ant|cow", "", "bee", "ant|bee|cow"]
    said = [[name for name, p in zip(("ant", "bee", "cow"), row, strict=True) if p > 0.5] for row in probabilities]
    assert [row[2] for row in rows] == ["|".join(names) for names in said]
    assert rows[3][3:] == ["False", rows[3][4], "", "", ""]


def test_many_classes_are_told_by_the_best_and_the_worst() -> None:
    label = np.repeat(np.arange(30), 4)
    predicted = np.where(np.arange(120) % 4 < 3, label, (label + label % 7) % 30)
    answers = {
        "label": label, "predicted": predicted, "rank": (label != predicted) * 1, "loss": np.ones(120),
        "nll": np.ones(120), "brier": np.ones(120), "probability": np.full(120, 0.9),
    }  # fmt: skip
    names = tuple(f"class {k} \x1b[31m{'x' * 40}" for k in range(30))
    lines = tables.lines(Evaluation(30, answers), names, {}, 0)
    assert [line.split()[0] for line in lines[:12]] == ["best", *["class"] * 5, "worst", *["class"] * 5]
    assert "\x1b" not in "".join(lines) and max(map(len, lines[:12])) < 70
