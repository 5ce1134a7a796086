"""Which folders are splits and which are classes, and what is said of that which is neither."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxsft.cli import UserError
from jaxsft.data.base import Arrays, Options
from jaxsft.data.folder import EXTENSIONS, images, open_folder
from jaxsft.data.sources import open_source
from tests.files import write


def tree(root: Path, *folders: str, count: int = 2) -> str:
    """Folders of so many pictures each."""
    for name in folders:
        for i in range(count):
            write(root / name / f"{i}.png", i)
    return str(root)


SPELLINGS = [
    ("Train", "Test"),
    ("TRAIN", "VAL"),
    ("Training", "Validation"),
    ("training", "Testing"),
    ("train", "valid"),
]


@pytest.mark.parametrize(("train", "held_out"), SPELLINGS)
def test_splits_whatever_their_spelling(train: str, held_out: str, tmp_path: Path):
    root = tree(tmp_path, f"{train}/ant", f"{train}/bee", f"{held_out}/bee")
    source, evaluated = (open_folder(root, split, Options()) for split in ("train", ""))
    assert source.class_names == evaluated.class_names == ("ant", "bee")
    assert (len(source), len(evaluated)) == (4, 2)
    assert (source.split, evaluated.split) == (train, held_out)
    assert open_folder(root, f"{train}[:50%]", Options()).split == f"{train}[:50%]"
    assert open_folder(root, held_out.lower(), Options()).paths == evaluated.paths
    assert open_folder(root, "", Options(divide=False)).paths == evaluated.paths


@pytest.mark.parametrize(("one", "other"), [("val", "Validation"), ("Test", "test"), ("train", "Training")])
def test_two_spellings_of_a_split_are_refused(one: str, other: str, tmp_path: Path):
    root = tree(tmp_path, "train/ant", f"{one}/ant", f"{other}/ant")
    with pytest.raises(UserError, match="has two splits of one name, '.*' and '.*'; keep one"):
        open_folder(root, "train", Options())


CLASSES = [("bus", "car", "train"), ("Test", "exam", "quiz"), ("bus/red", "train"), ("val", "vessel")]


@pytest.mark.parametrize("names", CLASSES)
def test_a_folder_that_holds_pictures_is_a_class(names: tuple[str, ...], tmp_path: Path):
    source = open_folder(tree(tmp_path, *names), "train+val", Options())
    assert source.class_names == tuple(name.split("/")[0] for name in names)
    assert len(source) == 2 * len(names)


def test_a_split_of_another_name_and_what_is_no_split(tmp_path: Path):
    root = tree(tmp_path, "train/ant", "holdout/ant")
    (tmp_path / "notes/deep").mkdir(parents=True)
    (tmp_path / "notes/deep/a.txt").write_text("no picture")
    assert len(open_folder(root, "holdout", Options())) == 2
    with pytest.raises(UserError, match="no split to evaluate on; .*known: holdout, train, with slices"):
        open_folder(root, "", Options())


def test_a_test_folder_without_classes_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture):
    root = tree(tmp_path, "train/cat", "train/dog", "test")
    assert [len(open_folder(root, split, Options())) for split in ("train", "")] == [2, 2]
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"warning: {root}/test holds pictures but no class folders: it is left out"
    for split in ("test", "Test", "train+test[:1]"):
        with pytest.raises(UserError, match="test holds pictures but no class folders; sort them"):
            open_folder(root, split, Options())
    flat = tree(tmp_path / "flat", "train", "test")
    with pytest.raises(UserError, match="train holds pictures but no class folders; sort them"):
        open_folder(flat, "val", Options())


def test_train_alone_is_divided(tmp_path: Path):
    root = tree(tmp_path, "Train/ant", "Train/bee", count=10)
    train, val = (open_folder(root, split, Options(eval_fraction=0.2)) for split in ("train", ""))
    assert np.bincount(train.labels).tolist() == [8, 8]
    assert np.bincount(val.labels).tolist() == [2, 2]
    assert not set(train.paths) & set(val.paths)
    assert (train.split, val.split) == ("train", "val")
    whole = open_folder(root, "", Options(divide=False))
    assert (len(whole), whole.split) == (20, "all")
    assert open_folder(root, "train", Options(divide=False)).paths == whole.paths


def test_one_tree_is_read_whole(tmp_path: Path):
    root = tree(tmp_path, "ant", "bee", count=3)
    whole = open_source(f"folder:{root}", "", Options(divide=False))
    assert (len(whole), whole.split, whole.class_names) == (6, "all", ("ant", "bee"))
    assert len(open_folder(root, "all[:50%]", Options(divide=False))) == 3


def test_one_image_a_class_leaves_none_to_evaluate_on(tmp_path: Path):
    root = tree(tmp_path, "ant", "bee", count=1)
    with pytest.raises(UserError, match="has a single image of each class: nothing is left to evaluate on; add images"):
        open_folder(root, "train", Options())
    assert len(open_folder(root, "", Options(divide=False))) == 2


def test_the_order_of_classes(tmp_path: Path):
    root = tree(tmp_path, "10", "9", "1")
    assert open_folder(root, "train", Options()).class_names == ("1", "10", "9")
    assert open_folder(root, "train", Options(class_order="numeric")).class_names == ("1", "9", "10")


def test_names_of_classes_are_taken_as_they_are(tmp_path: Path):
    names = ("$HOME", "$_$", "coin_$1_$2", "{x}", "~")
    assert open_folder(tree(tmp_path, *names), "train", Options()).class_names == names


def test_the_nine_endings_and_what_is_passed_over(tmp_path: Path, capfd: pytest.CaptureFixture):
    assert EXTENSIONS == (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    for i, ending in enumerate(EXTENSIONS):
        write(tmp_path / "train" / "ab"[i % 2] / f"{i}{ending.upper() if i < 2 else ending}")
    tree(tmp_path, "val/a")
    for name in ("train/a/x.gif", "train/a/deep/y.GIF", "train/b/notes.txt", "val/a/README", "train/a/.hidden.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("passed over")
    write(tmp_path / "train/loose.png")
    assert [len(open_folder(str(tmp_path), split, Options())) for split in ("train", "")] == [9, 2]
    assert capfd.readouterr().err.splitlines() == [
        f"warning: {tmp_path}/train: 1 picture beside the class folders passed over",
        f"warning: folder:{tmp_path}: 4 files of other kinds passed over (.gif, .txt, no ending)",
    ]
    found = images(tmp_path / "train", Options())
    assert [Path(path).name for path in found] == ["loose.png", *sorted(Path(p).name for p in found if "/a/" in p),
                                                   *sorted(Path(p).name for p in found if "/b/" in p)]  # fmt: skip


def test_a_hostile_name_stays_one_line(tmp_path: Path, capfd: pytest.CaptureFixture):
    root = tree(tmp_path, "train/ant", "train/bee", "val/ant\x1b[31m\nred")
    (tmp_path / "train/ant/a.\x1b[2J\n").write_text("")
    open_folder(root, "train", Options())
    (line,) = capfd.readouterr().err.splitlines()
    assert "\x1b" not in line
    with pytest.raises(UserError, match=r"split 'val' of .* has the class 'ant\\x1b\[31m\\nred', which 'train' lacks"):
        open_folder(root, "", Options())


def test_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tree(tmp_path / "a", "train/ant", "train/bee", "val/ant")
    before = open_folder(root, "train", Options())
    assert len({before.listing, open_folder(root, "val", Options()).listing, ""}) == 3
    assert before.select(np.array([1])).listing == before.listing
    assert before.relabelled(before.labels, ("x", "y")).split == "train"
    (tmp_path / "a/train/ant/0.png").write_text("broken")
    skipped = open_folder(root, "train", Options(on_error="skip"))
    assert (len(skipped), skipped.listing) == (3, before.listing)
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (f"{tmp_path}/b/", "~/b"):
        assert open_folder(place, "train", Options(on_error="skip")).listing == before.listing
    monkeypatch.chdir(tmp_path / "b")
    assert open_folder(".", "train", Options(on_error="skip")).listing == before.listing
    (tmp_path / "b/train/bee").rename(tmp_path / "b/train/wasp")
    assert open_folder(".", "train", Options(on_error="skip")).listing != before.listing


def test_arrays_carry_split_and_listing():
    arrays = Arrays(np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int32), ("a",), split="val", listing="x")
    assert {(a.split, a.listing) for a in (arrays.select(np.array([0])), arrays.relabelled(arrays.labels, ["b"]))} == {
        ("val", "x")
    }


def test_an_address_is_no_folder():
    with pytest.raises(UserError, match="ftp://bucket can't be used: ftp:// is not known; name a local path"):
        open_folder("ftp://bucket", "train", Options())
    with pytest.raises(UserError, match="is no folder"):
        open_folder("x" * 5000, "train", Options())
