"""Sets of Hugging Face's `datasets`: every kind of column of classes, rows without a label or an image."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from jaxsft.cli import UserError
from jaxsft.data import decode
from jaxsft.data.base import Options
from jaxsft.data.sources import open_source

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the extra [hf] is not installed"
)


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package 'datasets'; install the extra: pip install 'jaxsft\[hf\]'"):
        open_source("hf:cifar10", "train")


def cells(levels: list[int]) -> list[dict[str, Any]]:
    """Encoded pictures of two sizes, each of one grey level."""
    found = []
    for level in levels:
        out = io.BytesIO()
        PIL.Image.fromarray(np.full((8, 8 + level % 2, 3), level, np.uint8)).save(out, "PNG")
        found.append({"bytes": out.getvalue(), "path": None})
    return found


def table(labels: list[Any], kind: str | Sequence[str] = ("cat", "dog"), column: str = "label"):
    """A Dataset whose image of row i has the level i, with labels of a kind: a dtype, or names."""
    import datasets

    feature = datasets.Value(kind) if isinstance(kind, str) else datasets.ClassLabel(names=list(kind))
    features = datasets.Features({"img": datasets.Image(), column: feature})
    return datasets.Dataset.from_dict({"img": cells([*range(len(labels))]), column: labels}, features=features)


def saved(tmp_path: Path, **splits: Any) -> str:
    import datasets

    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    return f"hf:{tmp_path / 'set'}"


def level(source, index: int) -> int:
    return int(np.asarray(source[index])[0, 0, 0])


@needs_datasets
def test_train_alone_is_divided(tmp_path: Path):
    table([i % 2 for i in range(20)]).to_parquet(str(tmp_path / "set" / "train.parquet"))
    train, val = (open_source(f"hf:{tmp_path / 'set'}", split, Options(eval_fraction=0.2)) for split in ("train", ""))
    assert train.class_names == ("cat", "dog")
    assert sorted(level(source, i) for source in (train, val) for i in range(len(source))) == list(range(20))
    assert (len(val), train.split, val.split, val.listing) == (4, "train", "val", "")
    assert all(level(train, i) % 2 == train.labels[i] for i in range(len(train)))
    part = train.select(np.array([3, 1]))
    assert [level(part, i) for i in range(2)] == [level(train, 3), level(train, 1)]
    for split in ("", "train"):
        assert len(open_source(f"hf:{tmp_path / 'set'}", split, Options(divide=False))) == 20
    with pytest.raises(UserError, match="can't be had"):
        open_source(f"hf:{tmp_path / 'none'}", "train")


@needs_datasets
def test_a_dataset_without_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = table([0, 1] * 5)
    whole.set_format("numpy", columns=["label"])  # is saved too, and hides the images
    whole.save_to_disk(str(tmp_path / "plain"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [len(open_source("hf:~/plain", split)) for split in ("train", "")] == [8, 2]
    source = open_source("hf:~/plain", "", Options(divide=False))
    assert ([level(source, i) for i in range(10)], source.split) == ([*range(10)], "all")


KINDS = {
    "text": (["dog", "10", "9", "dog"], "string", "text", ("10", "9", "dog")),
    "text of numbers": (["10", "9", "9", "10"], "string", "text", ("10", "9")),
    "text in numeric order": (["10", "9", "9", "10"], "large_string", "numeric", ("9", "10")),
    "integers": ([10, 9, 9, 10], "int64", "text", ("9", "10")),  # numbers of classes stay in their order
    "truths": ([True, False, True, True], "bool", "text", ("False", "True")),
}


@needs_datasets
@pytest.mark.parametrize("case", KINDS)
def test_columns_of_values(case: str, tmp_path: Path):
    labels, kind, order, names = KINDS[case]
    spec = saved(tmp_path, train=table(labels, kind, "Class_Name"), test=table(labels[:1], kind, "Class_Name"))
    source = open_source(spec, "train", Options(class_order=order))
    assert source.class_names == names
    assert [names[n] for n in source.labels] == [str(label) for label in labels]
    assert open_source(spec, "", Options(class_order=order)).class_names == names


UNLABELLED = {
    "-1 of a class": ([0, -1, 1, -1], ["cat", "dog"]),
    "None of a class": ([0, None, 1, None], ["cat", "dog"]),
    "-1 of a number": ([3, -1, 4, -1], "int32"),
    "None of a text": (["cat", None, "dog", ""], "string"),
}


@needs_datasets
@pytest.mark.parametrize("case", UNLABELLED)
def test_rows_without_a_label(case: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    labels, kind = UNLABELLED[case]
    spec = saved(tmp_path, train=table([labels[0], labels[2]], kind), test=table(labels, kind))
    assert len(open_source(spec, "train")) == 2
    with pytest.raises(UserError, match=r"2 of 4 rows of split 'test' of hf:.* have no label; .*on_error=skip"):
        open_source(spec, "test")
    capfd.readouterr()
    source = open_source(spec, "", Options(on_error="skip"))
    assert (source.labels.tolist(), [level(source, i) for i in range(2)]) == ([0, 1], [0, 2])
    assert "2 of 4 rows of split 'test'" in capfd.readouterr().err


@needs_datasets
def test_unlabelled_rows_of_a_set_that_is_divided(tmp_path: Path):
    spec = saved(tmp_path, train=table([0, 1, -1] * 6))
    with pytest.raises(UserError, match="rows of split 'train' of hf:.* have no label"):
        open_source(spec, "train")
    parts = [open_source(spec, split, Options(on_error="skip")) for split in ("train", "val")]
    assert sorted(level(source, i) for source in parts for i in range(len(source))) == [
        i for i in range(18) if i % 3 < 2
    ]


@needs_datasets
def test_images_that_are_not_there(tmp_path: Path):
    import datasets

    rows = {
        "img": [*cells([0]), None, {"bytes": b"", "path": None}, {"bytes": b"text", "path": None}],
        "label": [0] * 4,
    }
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])})
    source = open_source(saved(tmp_path, val=datasets.Dataset.from_dict(rows, features=features)), "val")
    assert level(source, 0) == 0
    for index, reason in ((1, "no image"), (2, "no image"), (3, "not an image")):
        with pytest.raises(decode.Unreadable, match=reason):
            source[index]
    assert source.select(np.array([3])).name(0) == f"row 3 of split val of hf:{tmp_path / 'set'}"


def without_labels():
    return table([0, 1]).remove_columns("label")


WRONG = {
    "no labels anywhere": (without_labels, without_labels, "has no column of images and one of classes; it has img"),
    "none in this split": (lambda: table([0, 1]), without_labels, "2 of 2 rows of split 'test' .* have no label"),
    "fractions": (lambda: table([0.5, 1.5], "float32"), lambda: table([0.5], "float32"), "no column of images and one"),
    "a class that train lacks": (
        lambda: table(["a", "b"], "string"),
        lambda: table(["c"], "string"),
        "split 'test' of hf:.* has the class 'c', which 'train' lacks",
    ),
    "other names": (
        lambda: table([0, 1]),
        lambda: table([0], ["fox"]),
        "split 'test' of hf:.* has the class 'fox', which 'train' lacks",
    ),
    "no such split": (lambda: table([0, 1]), None, "has no split 'test': it has train, val; name one"),
}


@needs_datasets
@pytest.mark.parametrize("case", WRONG)
def test_wrong_sets(case: str, tmp_path: Path):
    train, test, message = WRONG[case]
    splits = {"train": train(), **({"test": test()} if test else {"val": train()})}
    with pytest.raises(UserError, match=message):
        open_source(saved(tmp_path, **splits), "test")


@needs_datasets
def test_splits_may_have_their_classes_in_another_order(tmp_path: Path):
    spec = saved(tmp_path, train=table([0, 1]), test=table([0, 1, 1], ["dog", "cat"]))
    assert open_source(spec, "").labels.tolist() == [1, 0, 0]


@needs_datasets
def test_a_number_that_is_no_class(tmp_path: Path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = [{"img": cell, "label": label} for cell, label in zip(cells([0, 1]), [0, 7], strict=True)]
    (tmp_path / "set").mkdir()
    written = pyarrow.Table.from_pylist(rows, features.arrow_schema)
    for split in ("train", "test"):
        pyarrow.parquet.write_table(written, tmp_path / "set" / f"{split}.parquet")
    with pytest.raises(UserError, match="has the label 7, which is none of its 2 classes"):
        open_source(f"hf:{tmp_path / 'set'}", "train")


@needs_datasets
def test_an_address_is_no_set():
    with pytest.raises(UserError, match="gs://bucket/set can't be used: it is no place"):
        open_source("hf:gs://bucket/set", "train")
