"""Images listed in a CSV file: any header, any delimiter, one order of the classes; what does not fit is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxsft.cli import UserError
from jaxsft.data.base import Options
from jaxsft.data.classes import in_order
from jaxsft.data.table import labels_in, open_csv
from tests.files import write

HALF = Options(eval_fraction=0.5)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two pictures of each of two classes."""
    for name in ("ant/0", "ant/1", "bee/0", "bee/1"):
        write(tmp_path / "img" / f"{name}.png")
    return tmp_path


def opened(place: Path, lines: str, split: str = "train+val", options: Options = HALF):
    (place / "a.csv").write_text(lines)
    return open_csv(str(place / "a.csv"), split, options)


NAMES = ("img/ant/0.png", "img/ant/1.png", "img/bee/0.png", "img/bee/1.png")
ROWS = [(name, name.split("/")[1]) for name in NAMES]
LINES = "".join(f"{name},{label}\n" for name, label in ROWS)
READ = {
    "no header": LINES,
    "path,label": "path,label\n" + LINES,
    "filename": "filename,label\n" + LINES,
    "any case, spaces": "Image Path , CLASS\n" + LINES,
    "file_name and category": "file_name,category\n" + LINES,
    "any order, more columns": "id,target,width,image\n" + "".join(f"7,{label},30,{name}\n" for name, label in ROWS),
    "semicolons": "path;label\n" + LINES.replace(",", ";"),
    "semicolons, no header": LINES.replace(",", ";"),
    "tabs": "img\tclass_name\n" + LINES.replace(",", "\t"),
    "backslashes": "path,label\n" + LINES.replace("/", "\\"),
    "backslashes, no header": LINES.replace("/", "\\"),
    "quoted, blank lines, Windows": "\ufeffpath,label\r\n\r\n"
    + "".join(f'"{name}", "{label}"\r\n' for name, label in ROWS)
    + ",\r\n",
    "an empty column of splits": "path,label,split\n" + LINES.replace("\n", ",\n"),
}


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("case", READ)
def test_tables_that_are_read(case: str, on_error: str, place: Path):
    source = opened(place, READ[case], options=Options(eval_fraction=0.5, on_error=on_error))
    assert source.class_names == ("ant", "bee")
    assert sorted(source.paths) == [str(place / name) for name in NAMES]
    assert all(source.class_names[n] in path for n, path in zip(source.labels, source.paths, strict=True))


def test_a_backslash_in_a_name_is_kept(place: Path):
    write(place / "img\\ant\\0.png", 1)
    assert str(place / "img\\ant\\0.png") in opened(place, LINES.replace("/", "\\")).paths


def test_a_path_with_a_comma_and_one_without_an_ending(place: Path):
    write(place / "a,b.png")
    (place / "img/ant/0.png").rename(place / "plain")
    source = opened(place, "plain;x\na,b.png;x\n")
    assert sorted(source.paths) == [str(place / "a,b.png"), str(place / "plain")]


SPLITS = {
    "as they are": ("train", "val"),
    "long names": ("Training", "Validation"),
    "capitals": ("TRAIN", "TEST"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_a_column_of_splits(case: str, place: Path):
    train, held_out = SPLITS[case]
    lines = "subset,path,label\n" + "".join(
        f"{held_out if '1.png' in name else train},{name},{label}\n" for name, label in ROWS
    )
    assert opened(place, lines, "train").paths == tuple(str(place / n) for n in NAMES if "0.png" in n)
    evaluated = opened(place, lines, "")
    assert evaluated.paths == tuple(str(place / n) for n in NAMES if "1.png" in n)
    assert (evaluated.split, opened(place, lines, "train[:1]").split) == (held_out, f"{train}[:1]")


def test_train_alone_is_divided_and_without_division_all_is_read(place: Path):
    alone = "path,label,split\n" + LINES.replace("\n", ",Train\n")
    for lines in (LINES, alone):
        assert [len(opened(place, lines, split)) for split in ("train", "")] == [2, 2]
        whole = opened(place, lines, "", Options(divide=False))
        assert (whole.split, len(whole)) == ("all", 4)
    assert len(opened(place, alone, "train", Options(divide=False))) == 4
    with pytest.raises(UserError, match=r"has no split 'val': it has all; name one of them"):
        opened(place, LINES, "val", Options(divide=False))


WRONG = {
    "missing": (None, "can't be read"),
    "empty": ("path,label\n", "lists no images"),
    "nothing": ("\n", "lists no images"),
    "short line": ("a.png,cat\nb.png\n", "line 2 of .* is not path,label"),
    "short line under a header": ("path,label\na.png\n", "line 2 of .* has 1 cells, its header 2"),
    "long line": ("path,label\na.png,cat,dog\n", "line 2 of .* has 3 cells, its header 2"),
    "no label": ("path,label\na.png,\n", "line 2 of .* is not path,label"),
    "a NUL": ("path,label\na\0.png,cat\n", "line 2 of .* is not path,label"),
    "splits here and there": ("a.png,cat,train\nb.png,cat\n", "some lines of .* name a split"),
    "two spellings": ("a.png,cat,val\nb.png,cat,Valid\n", "two splits of one name, 'val' and 'Valid'; keep one"),
    "binary": (b"\xff\xfe\x00\x01", "can't be read"),
    "no such image": ("none.png,cat\nnone.png,cat\n", "none.png: no such file"),
    "single images": ("img/ant/0.png,ant\nimg/bee/0.png,bee\n", "single image of each class: nothing is left"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tables(case: str, place: Path):
    content, message = WRONG[case]
    if content is not None:
        (place / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        open_csv(str(place / "a.csv"), "train", HALF)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("first", ["id,label", "filename,breed", "cat,img/ant/0.png", "sep=;", "img/ant/0.png"])
def test_a_first_line_that_is_neither_header_nor_picture(first: str, on_error: str, place: Path):
    with pytest.raises(UserError, match=r"a\.csv names neither columns, as path,label does, nor a picture") as error:
        opened(place, f"{first}\n{LINES}", options=Options(eval_fraction=0.5, on_error=on_error))
    assert repr(first) in str(error.value)


def test_places_that_are_written_otherwise(place: Path, monkeypatch: pytest.MonkeyPatch):
    (place / "a.csv").write_text(LINES)
    monkeypatch.setenv("HOME", str(place))
    assert len(open_csv("~/a.csv", "train+val", HALF)) == 4
    with pytest.raises(UserError, match=r"ftp://host/a.csv can't be used: ftp:// is not known; name a local"):
        open_csv("ftp://host/a.csv", "train", HALF)


def labelled(place: Path, lines: str, split: str = "train+val", **options) -> dict[str, set[str]]:
    """The labels of each picture of a table, by its name from `place`."""
    source = opened(place, lines, split, Options(eval_fraction=0.5, **options))
    assert source.multi_label and source.labels.dtype == np.uint8
    return {
        path.removeprefix(f"{place}/"): {source.class_names[k] for k in np.flatnonzero(row)}
        for path, row in zip(source.paths, source.labels, strict=True)
    }


SEVERAL = dict(zip(NAMES, ({"red"}, {"red", "round"}, set(), {"round", "blue"}), strict=True))
CELLS = dict(zip(NAMES, ("red", "red{0}round", "", " blue{0}{0} round{0}blue "), strict=True))
COLUMNS_OF_CLASSES = "id,red,image,blue,round\n" + "".join(
    f"7,{int('red' in has)},{name},{int('blue' in has)},{int('round' in has)}.0\n" for name, has in SEVERAL.items()
)
# what -> the table, the delimiter of its labels
OF_SEVERAL = {
    "semicolons": ("path,labels\n" + "".join(f"{n},{c.format(';')}\n" for n, c in CELLS.items()), ";"),
    "spaces, no header": ("".join(f"{n},{c.format(' ')}\n" for n, c in CELLS.items()), " "),
    "bars in a table of semicolons": (
        "labels;file\n" + "".join(f"{c.format('|')};{n}\n" for n, c in CELLS.items()),
        "|",
    ),
    "commas, quoted": ("path,label\n" + "".join(f'{n},"{c.format(",")}"\n' for n, c in CELLS.items()), ","),
    "a column a class": (COLUMNS_OF_CLASSES, ""),
    "a column a class, tabs": (COLUMNS_OF_CLASSES.replace(",", "\t"), ""),
}


@pytest.mark.parametrize("case", OF_SEVERAL)
def test_tables_of_several_labels_an_image(case: str, place: Path, capsys: pytest.CaptureFixture[str]):
    lines, delimiter = OF_SEVERAL[case]
    assert labelled(place, lines, label_delimiter=delimiter) == SEVERAL
    source = opened(place, lines, options=Options(eval_fraction=0.5, label_delimiter=delimiter))
    assert source.class_names == ("blue", "red", "round")
    said = capsys.readouterr().err
    assert ("a.csv: no classes, for they are not 0 or 1 in every line, are 'id'\n" in said) == ("column" in case)


def test_several_labels_in_splits_are_those_of_train(place: Path):
    rows = "".join(f"{n},{c.format(';')},{'val' if '1.png' in n else 'train'}\n" for n, c in CELLS.items())
    with pytest.raises(UserError, match="split 'val' of csv:.* has the class 'round', which 'train' lacks"):
        opened(place, rows, "", Options(label_delimiter=";"))
    rows = rows.replace("bee/0.png,", "bee/0.png,blue;round")
    assert labelled(place, rows, "", label_delimiter=";") == {n: SEVERAL[n] for n in NAMES if "1.png" in n}
    # A class that has a column of its own is one, whatever images have it.
    columns = "path,split,b,a,c\n" + "".join(f"{n},{'val' if '1.png' in n else 'train'},1,0,0\n" for n in NAMES)
    assert opened(place, columns, "", Options()).class_names == ("a", "b", "c")


def test_the_listing_is_of_several_labels_in_any_order(place: Path):
    lines, delimiter = OF_SEVERAL["semicolons"]
    listings = [
        opened(place, text, "", Options(divide=False, label_delimiter=delimiter)).listing
        for text in (lines, lines.replace("red;round", "round;red"), lines.replace("red;round", "round"))
    ]
    assert listings[0] == listings[1] != listings[2]
    assert labels_in((), "g;b;e; a;c;f;b;d", {}, ";") == tuple("abcdefg")  # which hashing would change in each process


WRONG_OF_SEVERAL = {
    "twice": ("path,label\na.png,x;y\nb.png,x\na.png,z\n", r"line 4 of .* lists a.png again, after line 2; name all"),
    "none": ("path,label\na.png,\nb.png,;\n", r"no line of .* has a label; name those of each image"),
    "a path alone": ("a.png,x\nb.png\n", "line 2 of .* is not path,label"),
    "no path": ("path,label\n,x;y\n", "line 2 of .* is not path,label"),
    "a short line of columns": ("path,a,b\na.png,1,0\nb.png,1\n", "line 3 of .* has 2 cells, its header 3"),
    "one column": ("path,a\na.png,1\n", "names neither columns"),
    "columns of numbers": ("path,a,b\na.png,1,2\nb.png,2,0\n", "names neither columns"),
    "two columns of one name": ("path,a,b,a\na.png,1,0,1\n", "has two columns 'a'"),
}


@pytest.mark.parametrize("case", WRONG_OF_SEVERAL)
def test_wrong_tables_of_several_labels(case: str, place: Path):
    lines, message = WRONG_OF_SEVERAL[case]
    with pytest.raises(UserError, match=message):
        opened(place, lines, options=Options(label_delimiter=";"))


ORDERS = [
    ("text", ["10", "9", "1"], ("1", "10", "9")),
    ("numeric", ["10", "9", "1"], ("1", "9", "10")),
    ("numeric", ["1", "01", "2", "001", "0", "00"], ("0", "00", "001", "01", "1", "2")),
    ("text", ["1", "01"], ("01", "1")),
    ("numeric", ["10", "9", "a"], ("10", "9", "a")),
    ("numeric", ["10", "9", "²"], ("10", "9", "²")),
    ("numeric", ["9" * 5000, "1" + "0" * 5000], ("9" * 5000, "1" + "0" * 5000)),
]


@pytest.mark.parametrize(("order", "names", "want"), ORDERS)
def test_the_order_of_classes_is_one(order: str, names: list[str], want: tuple, monkeypatch: pytest.MonkeyPatch):
    """Whatever the order in which a set brings them, which hashing changes from process to process."""
    for several in (names, names[::-1]):
        monkeypatch.setattr("jaxsft.data.classes.set", lambda names, several=several: several, raising=False)
        assert in_order(names, order) == want


def test_the_order_of_classes_in_a_table(place: Path):
    lines = LINES.replace(",ant", ",10").replace(",bee", ",9")
    assert opened(place, lines).class_names == ("10", "9")  # torchvision's
    assert opened(place, lines, options=Options(eval_fraction=0.5, class_order="numeric")).class_names == ("9", "10")


def test_the_listing_is_of_all_that_is_listed(place: Path, tmp_path_factory: pytest.TempPathFactory):
    """Broken images too; and it stays when the data is moved, or paths are written from the root of the disk."""
    before = opened(place, LINES)
    assert len(before.listing) == 64
    (place / "img/ant/0.png").write_text("broken")
    skip = Options(eval_fraction=0.5, on_error="skip")
    assert (len(opened(place, LINES, options=skip)), opened(place, LINES, options=skip).listing) == (3, before.listing)
    moved = place.rename(tmp_path_factory.mktemp("moved") / "data")
    assert opened(moved, LINES, options=skip).listing == before.listing
    absolute = LINES.replace("img/", f"{moved}/img/")
    assert opened(moved, absolute, options=skip).listing == before.listing
    for other in (LINES.replace(",bee", ",wasp"), LINES.replace("bee/1.png", "bee/2.png"), LINES.partition("\n")[2]):
        assert opened(moved, other, options=skip).listing != before.listing
    assert opened(moved, LINES, "train", options=skip).listing != before.listing
