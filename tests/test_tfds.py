"""Prepared TFDS sets as a stranger may have left them: read without running what they name, or refused in one line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from jaxsft.cli import UserError
from jaxsft.data import decode, prepare, tfds
from jaxsft.data.base import Options
from jaxsft.data.tfds import open_tfds

OWN = "tensorflow_datasets.core.features."
IMAGE = {"pythonClassName": f"{OWN}image_feature.Image"}
LABEL = {"pythonClassName": f"{OWN}class_label_feature.ClassLabel", "classLabel": {"numClasses": "2"}}


def dictionary(**features: Any) -> dict[str, Any]:
    return {"pythonClassName": f"{OWN}features_dict.FeaturesDict", "featuresDict": {"features": features}}


def image_of(*shape: int) -> dict[str, Any]:
    return {**IMAGE, "image": {"dtype": "uint8", "shape": {"dimensions": [str(side) for side in shape]}}}


def prepared(root: Path, side: int = -1, features: Any = None, number: int = 5) -> Path:
    """A set `pets` 1.0.0 under `root` of 4 x 6 px, the first of them an EXIF orientation that swaps the sides."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    folder = root / "pets" / "1.0.0"
    folder.mkdir(parents=True)
    features = features or dictionary(image=image_of(*((-1, -1, 3) if side < 0 else (4, 6, 3))), label=LABEL)
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "label.labels.txt").write_text("cat\ndog\n")
    split = {"name": "train", "numBytes": "9", "shardLengths": [str(number)]}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "pets", "version": "1.0.0", "fileFormat": "array_record", "moduleName": "evil", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "pets-train.array_record-00000-of-00001"), "group_size:1"
    )
    for i in range(5):
        out, example = io.BytesIO(), tf_example_pb2.Example()
        exif = PIL.Image.Exif()
        if i == 0:
            exif[0x0112] = 6
        PIL.Image.fromarray(np.full((4, 6, 3), i, np.uint8)).save(out, "PNG", exif=exif)
        example.features.feature["image"].bytes_list.value.append(out.getvalue())
        example.features.feature["label"].int64_list.value.append(i % 2)
        writer.write(example.SerializeToString())
    writer.close()
    return folder


@pytest.mark.parametrize("resident_mb", [0, 1])
@pytest.mark.parametrize("side", [-1, 4])
def test_a_set_without_code_is_read(side: int, resident_mb: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also from a folder under `~`; of a set that says one size, pictures are taken as they lie."""
    prepared(tmp_path, side)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    source = open_tfds("pets", "train", Options(data_dir=f"~/{tmp_path.name}", resident_mb=resident_mb))
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 0, 1, 0]
    assert source.size == (None if side < 0 else (4, 6))
    shapes = [np.asarray(source[i]).shape[:2] for i in range(5)]
    assert shapes == [(6, 4) if side < 0 else (4, 6), *[(4, 6)] * 4]
    assert [np.asarray(source[i]).max() for i in range(5)] == list(range(5))


EVIL = {
    "at the top": {"pythonClassName": "evil.Features", "featuresDict": {}},
    "of a feature": dictionary(image=image_of(-1, -1, 3), label={**LABEL, "pythonClassName": "evil.Label"}),
    "as protobuf's own name": {"python_class_name": "evil.Features", "featuresDict": {}},
    "of the old form": {"type": "evil.Features", "content": {}},
    "within the old form": {
        "type": f"{OWN}features_dict.FeaturesDict",
        "content": {"image": {"type": "evil.Image", "content": {}}},
    },
    "within text": {
        "pythonClassName": f"{OWN}features_dict.FeaturesDict",
        "jsonFeature": {"json": json.dumps({"image": {"type": "evil.Image", "content": {}}})},
    },
    "within text of the old form": {
        "type": f"{OWN}features_dict.FeaturesDict",
        "content": json.dumps({"features": {"image": {**IMAGE, "pythonClassName": "evil.Image", "image": {}}}}),
        "proto_cls": "tensorflow_datasets.FeaturesDict",
    },
    "of a sequence": dictionary(x={
        "pythonClassName": f"{OWN}sequence_feature.Sequence",
        "sequence": {"feature": {"pythonClassName": "evil.Image", "image": {}}}}),
    "a module above": {"pythonClassName": "tensorflow_datasets.evil.Features", "featuresDict": {}},
}  # fmt: skip


@pytest.mark.parametrize("case", EVIL)
@pytest.mark.parametrize("name", ["pets", "pets:1.0.0"])
def test_what_a_set_names_is_not_imported(case: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'written')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = prepared(tmp_path, features=EVIL[case])
    with pytest.raises(
        UserError, match=r"tfds:pets.* names (tensorflow_datasets\.)?evil\.\w+, which is none of TFDS's"
    ):
        open_tfds(name, "train", Options(data_dir=str(tmp_path)))
    with pytest.raises(tfds.Foreign):
        tfds.reader(str(folder), "train")
    assert not (tmp_path / "written").exists()
    assert "evil" not in sys.modules


def nested(depth: int) -> str:
    return '{"pythonClassName": "x.Y", "featuresDict": {"features": {"a": ' * depth + "{}" + "}}}" * depth


def say(**features: Any) -> Callable[[Path], object]:
    """Another features.json."""
    return lambda folder: (folder / "features.json").write_text(json.dumps(dictionary(**features)))


# What is done to the prepared folder -> what is said of it.
DAMAGED = {
    "features that are no JSON": (lambda p: (p / "features.json").write_text("{"), "tfds:pets: "),
    "features that are a list": (lambda p: (p / "features.json").write_text("[]"), "tfds:pets: "),
    "features of great depth": (lambda p: (p / "features.json").write_text(nested(30_000)), "tfds:pets: "),
    "a list of great depth": (lambda p: (p / "features.json").write_text("[" * 200_000), "tfds:pets: "),
    "no features": (lambda p: (p / "features.json").unlink(), "TFDS has no data set 'pets'"),
    "binary features": (lambda p: (p / "features.json").write_bytes(b"\xff\xfe\0"), "tfds:pets: "),
    "no info": (lambda p: (p / "dataset_info.json").unlink(), "tfds:pets: Could not read dataset info"),
    "info that is no JSON": (lambda p: (p / "dataset_info.json").write_text("{"), "tfds:pets: "),
    "no records": (lambda p: records(p).unlink(), "split train in .*; prepare the set again"),
    "empty records": (lambda p: records(p).write_bytes(b""), "split train in .*; prepare the set again"),
    "records that are text": (lambda p: records(p).write_text("x" * 5000), "split train in .*; prepare the set again"),
    "records cut off": (lambda p: cut(records(p)), "record 0 of split train in .* is damaged; prepare the set again"),
    "no labels": (say(image=image_of(-1, -1, 3)), "has no 'image' and 'label'"),
    "a label that is an image": (say(image=LABEL, label=image_of(8, 8, 3)), "has no 'image' and 'label'"),
    "no classes": (say(image=image_of(-1, -1, 3), label={**LABEL, "classLabel": {}}), "has no 'image'"),
    "no dictionary": (lambda p: (p / "features.json").write_text(json.dumps(image_of(-1, -1, 3))), "has no"),
}  # fmt: skip


def records(folder: Path) -> Path:
    (found,) = folder.glob("*.array_record-*")
    return found


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_set_is_named(case: str, tmp_path: Path):
    make, message = DAMAGED[case]
    make(prepared(tmp_path))
    with pytest.raises(UserError, match=message):
        open_tfds("pets", "train", Options(data_dir=str(tmp_path)))


@pytest.mark.parametrize("number", [6, 10**13])
def test_fewer_records_than_it_says(number: int, tmp_path: Path):
    prepared(tmp_path, number=number)
    with pytest.raises(UserError, match="split train in .*: index 5 out of bound 5; prepare the set again"):
        open_tfds("pets", "train", Options(data_dir=str(tmp_path)))


def test_one_damaged_picture_is_one_bad_picture(tmp_path: Path):
    """A record that says less than it should is no traceback in a worker process."""
    folder = prepared(tmp_path)
    source = open_tfds("pets", "train", Options(data_dir=str(tmp_path)))
    cut(records(folder))
    tfds.reader.cache_clear()
    with pytest.raises(decode.Unreadable, match="its record is damaged"):
        source[0]
    records(folder).unlink()
    tfds.reader.cache_clear()
    with pytest.raises(decode.Unreadable, match="No such file"):
        source[0]


@pytest.mark.parametrize("resident_mb", [0, 1])
def test_a_cache_is_done_without(resident_mb: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """One that is a file, in whose place no folder can be made; and one that is torn, which is made anew."""
    prepared(tmp_path, 4)
    options = Options(data_dir=str(tmp_path), resident_mb=resident_mb)
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    labels = open_tfds("pets", "train", options).labels
    assert labels.tolist() == [0, 1, 0, 1, 0]
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "Not a directory" in warning
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    open_tfds("pets", "train", options)
    (kept,) = (tmp_path / "other").rglob("*.npz")
    content = kept.read_bytes()
    for torn in (content[:50], b"", content[:-30], b"PK" + content[:20] * 9, content.replace(b"0.npy", b"7.npy")):
        kept.write_bytes(torn)
        again = open_tfds("pets", "train", options)
        assert again.labels.tolist() == labels.tolist()
    assert kept.read_bytes() == content


def test_folders_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="ftp://host can't be used"):
        tfds.find_builder("pets", "ftp://host")
    monkeypatch.setattr(sys, "argv", ["prepare", "cifar10", "--data-dir", "ftp://host"])
    with pytest.raises(UserError, match="ftp://host can't be used"):
        prepare.main()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        tfds.tfds_builder("pets", str(tmp_path / "file"))


def test_what_is_prepared_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """A set without code can't be made, but it is there; its folder is under `~`, its name has a line's end in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    prepared(tmp_path / "a\nb")
    monkeypatch.setattr(sys, "argv", ["prepare", "pets", "--data-dir", "~/a\nb"])
    prepare.main()
    assert capfd.readouterr().out == f"{tmp_path}/a\\nb/pets/1.0.0\n"
