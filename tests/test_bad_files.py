"""Broken data: named, or left out and counted; the totals of an evaluation stay exact."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from jaxsft.cli import Stop, UserError
from jaxsft.data.base import Arrays, Options
from jaxsft.data.folder import open_folder
from jaxsft.data.loader import BadFiles, make_loader
from jaxsft.data.order import Order
from jaxsft.data.reading import EvalPlan, TrainPlan, in_memory
from jaxsft.models.weights import Preprocessing
from jaxsft.run.parallel import DataParallel

GOOD = 7


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height px."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def image(suffix: str, **options) -> bytes:
    import io

    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(out, suffix, **options)
    return out.getvalue()


# name -> (file name, content, what is said of it).
BAD = {
    "zero bytes": ("a.jpg", b"", "an empty file"),
    "text": ("a.jpg", b"these are no pixels", "not an image"),
    "decompression bomb": ("a.png", png(50000, 50000), "exceeds limit of .* pixels"),
    "cut in the header": ("a.jpg", image("JPEG")[:20], ""),
    "dangling link": ("a.png", None, "no such file"),
    "truncated JPEG": ("a.jpg", image("JPEG", quality=95)[:1500], "truncated"),
    "truncated PNG": ("a.png", image("PNG")[:1500], ""),
    "garbled PNG": ("a.png", image("PNG")[:200] + b"\xff" * 3000, ""),
    "truncated WebP": ("a.webp", image("WEBP")[:600], ""),
    "too few pixels": ("a.png", png(40, 50), ""),
}


def folder(tmp_path: Path, name: str, content: bytes | None) -> Path:
    """Seven good images in two classes and the bad one, the third in order."""
    for i in range(GOOD):
        path = tmp_path / "data" / "train" / "ab"[i >= 4] / f"{'0z'[i > 1]}{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.full((40, 50 + i % 2, 3), i * 10, np.uint8)).save(path)
    bad = tmp_path / "data" / "train" / "a" / name
    bad.symlink_to("nowhere") if content is None else bad.write_bytes(content)
    return tmp_path / "data"


def evaluate(root: Path, bad: BadFiles, one_size: bool = False) -> list[int]:
    """All batches of an evaluation; the grey levels of the images that counted, divided by ten."""
    options = Options(on_error=bad.on_error, divide=False)
    source = in_memory(open_folder(str(root), "train", options), options)
    loader = make_loader(source, EvalPlan(len(source), 3), DataParallel(), Preprocessing(16, 16), workers=0, bad=bad)
    levels = []
    for batch in loader.batches():
        mask = np.asarray(batch["mask"])
        levels += (np.asarray(batch["image"])[mask][:, 0, 0, 0] // 10).tolist()
    return levels


@pytest.mark.parametrize("case", BAD)
def test_a_broken_image_is_named(case: str, tmp_path: Path):
    name, content, reason = BAD[case]
    root = folder(tmp_path, name, content)
    with pytest.raises(UserError, match=rf"/a/{name}: .*{reason}.*; remove it, or leave such files out with --config"):
        evaluate(root, BadFiles("raise"))


@pytest.mark.parametrize("case", BAD)
def test_a_broken_image_is_left_out_and_listed(case: str, tmp_path: Path):
    """The evaluation counts each good image once; training gets a good image in the bad one's place."""
    name, content, _ = BAD[case]
    root, bad = folder(tmp_path, name, content), BadFiles("skip")
    assert sorted(evaluate(root, bad)) == list(range(GOOD))
    assert [Path(file).name for file in bad.found] == [name]

    options = Options(on_error="skip", divide=False)
    source = open_folder(str(root), "train", options)
    bad = BadFiles("skip")
    bad.write_to(tmp_path)
    assert not (tmp_path / "bad_files.txt").exists()
    plan = TrainPlan(Order(len(source), len(source), seed=0))
    loader = make_loader(source, plan, DataParallel(), Preprocessing(16, 16), workers=0, bad=bad)
    for step in range(2):
        batch = loader.batch(step)
        levels, labels = np.asarray(batch["image"])[0, :, 0, 0, 0] // 10, np.asarray(batch["label"])[0]
        assert set(levels) == set(range(GOOD))
        np.testing.assert_array_equal(labels, levels >= 4)  # a substitute brings its own label
    (line,) = (tmp_path / "bad_files.txt").read_text().splitlines()
    assert line.startswith(f"{root}/train/a/{name}\t")


def test_held_in_memory_they_are_left_out_too(tmp_path: Path):
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    for i in range(4):
        PIL.Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / f"{i}.png")
    whole = (root / "1.png").read_bytes()
    (root / "1.png").write_bytes(whole[: len(whole) - 30])
    options = Options(on_error="skip", divide=False)
    source = in_memory(open_folder(str(tmp_path), "train", options), options)
    assert source.images[:, 0, 0, 0].tolist() == [0, 2, 3]  # type: ignore[attr-defined]
    assert [Path(file).name for file, _ in source.bad] == ["1.png"]
    with pytest.raises(UserError, match=r"1\.png"):
        make_loader(source, EvalPlan(3, 3), DataParallel(), Preprocessing(8, 8), bad=BadFiles("raise"))


LATER = ("truncated JPEG", "zero bytes", "garbled PNG", "gone")  # what may happen to a file while a run goes on


@pytest.mark.parametrize("case", LATER)
def test_what_breaks_after_it_was_looked_at_is_left_out_too(case: str, tmp_path: Path):
    root = folder(tmp_path, "a.jpg", image("JPEG"))
    options = Options(on_error="skip", divide=False)
    source = open_folder(str(root), "train", options)
    assert len(source) == GOOD + 1
    file = root / "train" / "a" / "a.jpg"
    file.unlink() if case == "gone" else file.write_bytes(BAD[case][1] or b"")
    bad, plan = BadFiles("skip"), TrainPlan(Order(len(source), len(source), seed=0))
    batch = make_loader(source, plan, DataParallel(), Preprocessing(16, 16), workers=0, bad=bad).batch(0)
    levels = np.asarray(batch["image"])[0, :, 0, 0, 0] // 10
    assert set(levels) == set(range(GOOD))  # one of them twice
    assert list(bad.found) == [str(file)]
    loader = make_loader(source, EvalPlan(len(source), 3), DataParallel(), Preprocessing(16, 16), workers=0, bad=bad)
    assert sum(int(np.asarray(each["mask"]).sum()) for each in loader.batches()) == GOOD


def test_where_nothing_can_be_read_training_ends(tmp_path: Path):
    root = folder(tmp_path, "a.jpg", image("JPEG"))
    source = open_folder(str(root), "train", Options(on_error="skip", divide=False))
    for path in (*root.rglob("*.png"), *root.rglob("*.jpg")):
        path.write_bytes(path.read_bytes()[:60])
    plan = TrainPlan(Order(len(source), 2, seed=0))
    loader = make_loader(source, plan, DataParallel(), Preprocessing(16, 16), workers=0, bad=BadFiles("skip"))
    with pytest.raises(RuntimeError, match="no readable image"):
        loader.batch(0)


def test_a_picture_that_has_changed_its_size_is_named(tmp_path: Path):
    """The index knows one size of all; then one file is another picture, whose pixels must not be taken for its own."""
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    for i in range(4):
        PIL.Image.fromarray(np.full((8, 12, 3), i, np.uint8)).save(root / f"{i}.png")
    for on_error in ("skip", "raise"):
        options = Options(on_error=on_error, resident_mb=0, divide=False)
        source = open_folder(str(tmp_path), "train", options)
        assert source.size == (8, 12)
        PIL.Image.fromarray(np.full((1, 1, 3), 9, np.uint8)).save(root / "2.png")  # numpy would spread it over all
        bad = BadFiles(on_error)
        for held in (source, in_memory(source, dataclasses.replace(options, resident_mb=1))):
            bad = BadFiles(on_error)
            plan = EvalPlan(len(held), 4)
            if on_error == "raise":
                with pytest.raises(UserError, match=r"2\.png: is 1 x 1 px, not 12 x 8 px as when it was indexed"):
                    make_loader(held, plan, DataParallel(), Preprocessing(8, 8), workers=0, bad=bad).batch(0)
                continue
            loader = make_loader(held, plan, DataParallel(), Preprocessing(8, 8), workers=0, bad=bad)
            batch = loader.batch(0)
            assert np.asarray(batch["mask"]).sum() == 3
            assert [Path(file).name for file in bad.found] == ["2.png"]
        PIL.Image.fromarray(np.full((8, 12, 3), 2, np.uint8)).save(root / "2.png")


@pytest.mark.parametrize("broken", [False, True])
def test_in_memory_a_source_keeps_its_split_and_listing(tmp_path: Path, broken: bool):
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    for i in range(3):
        PIL.Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / f"{i}.png")
    if broken:
        whole = (root / "1.png").read_bytes()
        (root / "1.png").write_bytes(whole[: len(whole) - 30])
    options = Options(on_error="skip", divide=False)
    source = open_folder(str(tmp_path), "train", options)
    for name in ("split", "listing"):
        object.__setattr__(source, name, f"some {name}")
    held = in_memory(source, options)
    assert isinstance(held, Arrays)
    assert (held.split, held.listing, len(held)) == ("some split", "some listing", 3 - broken)


def test_a_strange_name_takes_one_line_and_changes_no_terminal(tmp_path: Path, capsys):
    bad = BadFiles("skip")
    bad.add([("a\nb\t.png", "torn"), ("\x1b[31mc.png", "cut\noff")])
    bad.write_to(tmp_path)
    bad.add([("d\udcff.png", "late")])
    expected = ["a\\nb\\t.png\ttorn", "\\x1b[31mc.png\tcut\\noff", "d\\udcff.png\tlate"]
    assert (tmp_path / "bad_files.txt").read_text().splitlines() == expected
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [f"warning: left out {line}" for line in
                        ("a\\nb\\t.png: torn", "\\x1b[31mc.png: cut\\noff", "d\\udcff.png: late")]  # fmt: skip


def test_a_list_that_cannot_be_written_is_named(tmp_path: Path):
    bad = BadFiles("skip")
    (tmp_path / "bad_files.txt").mkdir()
    with pytest.raises(Stop, match=rf"^{tmp_path}/bad_files.txt can't be written: Is a directory; make room or mend"):
        bad.write_to(tmp_path)
    with pytest.raises(Stop, match=rf"^{tmp_path}/bad_files.txt can't be written: Is a directory; make room or mend"):
        bad.add([("a.png", "torn")])
