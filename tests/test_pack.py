"""A packed set is the source that was packed: its labels, names, splits and slices, and to the last bit its pixels."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from jaxsft import storage
from jaxsft.cli import UserError
from jaxsft.data import decode, packing, records, sources
from jaxsft.data.base import Arrays, Options, Source, changed
from jaxsft.data.fingerprint import difference, fingerprint
from jaxsft.data.loader import make_loader
from jaxsft.data.order import Order
from jaxsft.data.packing import Form, pack
from jaxsft.data.reading import EvalPlan, Plan, TrainPlan, in_memory
from jaxsft.data.sources import open_source
from jaxsft.models.weights import Preprocessing
from jaxsft.run.parallel import DataParallel
from tests.commands import assert_refused, hear_command, run_command
from tests.files import write
from tests.test_loader import host
from tests.test_tfds import prepared

DEVICES = DataParallel()
SIZE = 40  # px, of the packed pictures; the model sees 32
TO = Preprocessing(SIZE, 32)
SIZES = ((60, 80), (90, 50), (41, 200), (64, 64), (40, 55), (20, 30))  # (height, width): larger, upright, long, small


def folder_of(root: Path, parts: tuple[str, ...] = ("train", "val"), number: int = 12) -> str:
    """Pictures of SIZES, one of them a JPEG that its EXIF tag turns."""
    for i in range(number * len(parts)):
        part, name = parts[i % len(parts)], f"{'ab'[i // 2 % 2]}/{i}.png"
        write(root / part / name, i, SIZES[i // 2 % len(SIZES)])
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    write(root / parts[0] / "a" / "turned.jpg", 99, (50, 70), exif=exif)
    return f"folder:{root}"


def table_of(root: Path) -> str:
    """Pictures with any number of labels, in a table that names no splits."""
    for i in range(20):
        write(root / f"{i}.png", i, SIZES[i % len(SIZES)])
    lines = [f"{i}.png,{';'.join(n for k, n in enumerate(('red', 'round')) if i >> k & 1)}" for i in range(20)]
    (root / "list.csv").write_text("\n".join(["path,labels", *lines]))
    return f"csv:{root / 'list.csv'}"


def hub_of(root: Path) -> str:
    pytest.importorskip("datasets")
    from tests.test_hub import saved, table

    return saved(root, train=table([0, 1] * 6), test=table([1, 0, 1]))


# kind of source -> how it is made, how it is opened, the splits asked for
SOURCES: dict[str, tuple[Callable[[Path], str], Options, tuple[str, ...]]] = {
    "folder": (folder_of, Options(), ("train", "", "val", "train[:5]", "train[50%:]+val[:3]", "all")),
    "one tree": (lambda root: folder_of(root, ("",), 20), Options(eval_fraction=0.3), ("train", "", "train[:7]")),
    "table": (table_of, Options(label_delimiter=";", eval_fraction=0.2), ("train", "val", "val+train[:4]")),
    "tfds": (lambda root: (prepared(root), "tfds:pets")[1], Options(data_dir="@"), ("train", "train[1:3]")),
    "tfds of one size": (
        lambda root: (prepared(root, 4), "tfds:pets")[1],
        Options(data_dir="@"),
        ("train", "train[2:]"),
    ),
    "hub": (hub_of, Options(), ("train", "test", "", "train[3:8]")),
    "sample": (lambda root: "sample", Options(), ("train[:50]", "test[-30:]")),
}


def same(ours: Source, theirs: Source) -> None:
    """What is said of the images, and the pictures where those of the source are small."""
    assert ours.class_names == theirs.class_names
    assert ours.labels.dtype == theirs.labels.dtype
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert ours.split == theirs.split
    if hasattr(theirs, "paths"):  # others have numbers, of a slice from its start; packed ones those in the whole
        assert [*map(ours.name, range(len(ours)))] == [*map(theirs.name, range(len(theirs)))]


LONGER = ("hub", "sample")  # seconds
CASES = [
    pytest.param(kind, as_files, marks=[pytest.mark.full] * (kind in LONGER), id=f"{kind}-{how}")
    for kind in SOURCES
    for how, as_files in (("pixels", False), ("files", True))
]


@pytest.mark.parametrize(("kind", "as_files"), CASES)
def test_it_is_the_source_that_was_packed(kind: str, as_files: bool, tmp_path: Path) -> None:
    make, options, asked = SOURCES[kind]
    (tmp_path / "data").mkdir()
    spec = make(tmp_path / "data")
    options = dataclasses.replace(options, data_dir=options.data_dir.replace("@", str(tmp_path / "data")))
    pack(spec, tmp_path / "out", Form(0 if as_files else SIZE, shard_mb=1), options)
    for split in asked:
        ours = open_source(f"packed:{tmp_path / 'out'}", split)
        theirs = open_source(spec, split, options)
        same(ours, theirs)
        for number in range(len(theirs)):
            want = np.asarray(theirs[number])
            if as_files or min(want.shape[:2]) <= SIZE:
                np.testing.assert_array_equal(np.asarray(ours[number]), want)
                assert not (as_files and theirs.encoded(number)) or ours.encoded(number) == theirs.encoded(number)
            else:
                assert min(np.asarray(ours[number]).shape[:2]) == SIZE
        part = ours.select(np.array([1, 0]))
        assert [part.name(0), part.name(1)] == [ours.name(1), ours.name(0)]
        np.testing.assert_array_equal(np.asarray(part[1]), np.asarray(ours[0]))


def batches(source: Source, plan: Plan, names: tuple[str, ...], to: Preprocessing = TO) -> list[dict[str, Any]]:
    loader = make_loader(source, plan, DEVICES, to, workers=0, augmentations=names)
    return [host(loader.batch(step)) for step in range(3)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("names", [(), ("random_resized_crop",)], ids=["middle", "canvas"])
def test_batches_are_those_of_the_source(names: tuple[str, ...], interpolation: str, tmp_path: Path) -> None:
    """At the size that they were packed at, to the last bit: the middle that is evaluated, and what crops are cut from.

    But for pictures that are longer than the canvas, which are squeezed onto it, and here from fewer pixels.
    """
    spec = folder_of(tmp_path / "data", number=24)
    pack(spec, tmp_path / "out", Form(SIZE, interpolation), Options())
    to = dataclasses.replace(TO, interpolation=interpolation)
    for source, there in [(open_source(s, "train"), s) for s in (spec, f"packed:{tmp_path / 'out'}")]:
        shapes = [np.asarray(source[i]).shape for i in range(len(source))]
        assert len({min(h, w) for h, w, _ in shapes}) > 1, there
    theirs, ours = open_source(spec, "train"), open_source(f"packed:{tmp_path / 'out'}", "train")
    plan = TrainPlan(Order(len(theirs), 8, 0)) if names else EvalPlan(len(theirs), 8)
    compared = 0
    for found, want in zip(batches(ours, plan, names, to), batches(theirs, plan, names, to), strict=True):
        assert found.keys() == want.keys()
        for name in found.keys() - {"image"}:
            np.testing.assert_array_equal(found[name], want[name])
        for row, number in enumerate(want["example"]):
            height, width, _ = np.asarray(theirs[int(number)]).shape
            if not names or max(height, width) <= 1.5 * min(height, width):
                np.testing.assert_array_equal(found["image"][row], want["image"][row])
                compared += 1
    assert compared > 12


def test_records_hold_the_larger_side_along_the_rows() -> None:
    """So that none has to be turned on its way to a canvas; the image is as it was."""
    for shape in ((30, 20), (20, 30), (20, 20), (1, 7)):
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        record = records.from_bytes(records.on_its_side(pixels, (60, 40)).to_bytes())
        assert record.pixels.shape[0] == min(shape)
        assert record.original == (60, 40)
        np.testing.assert_array_equal(record.image(), pixels)
    no_size = records.Record(pixels, False, (0, 7)).to_bytes()
    for content in (b"", b"x" * 100, no_size, records.on_its_side(pixels, (1, 7)).to_bytes()[:-1]):
        with pytest.raises(decode.Unreadable, match="its record is damaged"):
            records.from_bytes(content)


def test_an_interrupted_pack_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves nothing that looks finished; the second start decodes what is left, to the same end."""
    spec, out = folder_of(tmp_path / "data", number=40), tmp_path / "out"
    decoded: list[int] = []
    attempt, form = packing.attempt, Form(SIZE, shard_mb=0.02)  # type: ignore[arg-type]

    def counted(source: Source, number: int, form: Form) -> Any:
        decoded.append(number)
        if len(decoded) == 30 and limit:
            raise KeyboardInterrupt
        return attempt(source, number, form)

    monkeypatch.setattr(packing, "attempt", counted)
    limit = True
    with pytest.raises(KeyboardInterrupt):
        pack(spec, out, form, Options(), threads=1)
    assert [*out.glob("*.array_record")]
    with pytest.raises(UserError, match=f"{out} has no index.json: it was not packed to its end; pack it again"):
        open_source(f"packed:{out}", "train")
    with pytest.raises(UserError, match=f"{out} holds another set that is packed half"):
        pack(spec, out, Form(SIZE, "bicubic"), Options())
    done, limit = len(decoded), False
    index = pack(spec, out, form, Options(), threads=1)
    assert len(decoded) - done < 81 - 10
    whole = pack(spec, tmp_path / "whole", form, Options())
    assert index == whole
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert all(p.read_bytes() == (tmp_path / "whole" / p.name).read_bytes() for p in out.glob("*.array_record"))
    assert len([*out.glob("*.array_record")]) > 4
    same(open_source(f"packed:{out}", "train"), open_source(spec, "train"))


def test_a_broken_picture_is_left_out_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the index of a folder knows, and one that breaks later, which is found when it is read."""
    spec = folder_of(tmp_path / "data")
    (tmp_path / "data/train/a/broken.png").write_bytes(b"no picture")
    command = f"data.pack {spec} --out @/out --size {SIZE}"
    assert_refused(command, "@/data/train/a/broken.png: not an image, or none of JPEG, PNG, WebP, ...", tmp_path)
    status, said = run_command(command, tmp_path)
    assert "leave such files out with --on-error=skip" in said
    status, out, said = hear_command(f"{command} --on-error skip", tmp_path)
    assert (status, out) == (0, f"{tmp_path}/out: 25 images in 2 files, 0 MB; 1 left out\n")
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert [file for file, _ in index["splits"]["train"]["left_out"]] == [f"{tmp_path}/data/train/a/broken.png"]

    class Late(Arrays):
        def __getitem__(self, index: int) -> np.ndarray:
            if index == 2:
                raise decode.Unreadable("is gone")
            return super().__getitem__(index)

    images = np.arange(5, dtype=np.uint8)[:, None, None, None] + np.zeros((5, 4, 4, 3), np.uint8)
    late = Late(images, np.array([0, 1, 0, 1, 0], np.int32), ("a", "b"))
    monkeypatch.setitem(sources.SOURCES, "late", lambda name, split, options: late)
    with pytest.raises(UserError, match="image 2: is gone; remove it, or leave such pictures out with --on-error"):
        pack("late:", tmp_path / "late", Form(SIZE), Options())
    pack("late:", tmp_path / "late", Form(SIZE), Options(on_error="skip"))
    found = open_source(f"packed:{tmp_path / 'late'}", "train")
    assert found.labels.tolist() == [0, 1, 1, 0]
    assert [np.asarray(found[i])[0, 0, 0] for i in range(4)] == [0, 1, 3, 4]
    assert [found.name(i) for i in range(4)] == ["image 0", "image 1", "image 3", "image 4"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder, whose test copies what it changes."""
    root = tmp_path_factory.mktemp("packed")
    pack(folder_of(root / "data"), root / "out", Form(SIZE), Options())
    return root / "out"


def test_pictures_packed_too_small_are_refused(small: Path) -> None:
    source = open_source(f"packed:{small}", "train")
    alike = [i for i in range(len(source)) if np.asarray(source[i]).shape == (40, 53, 3)]
    resident = in_memory(changed(source.select(np.array(alike)), size=(40, 53)), Options())
    assert isinstance(resident, Arrays)
    for to, message in (
        (Preprocessing(41, 32), "packed at 40 px, and this run resizes them to 41; pack them again with --size=41"),
        (Preprocessing(40, 32, interpolation="bicubic"), "packed with bilinear .* pack them again with --interp"),
    ):
        for held in (source, resident):
            with pytest.raises(UserError, match=message):
                make_loader(held, EvalPlan(2, 2), DEVICES, to, workers=0)
    make_loader(source, EvalPlan(4, 4), DEVICES, Preprocessing(36, 32), workers=0)
    with pytest.raises(UserError, match="pictures as their EXIF tag says, and config.data.exif_orientation is False"):
        open_source(f"packed:{small}", "train", Options(upright=False))


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(out: Path) -> None:
        index = json.loads((out / "index.json").read_text())
        change(index)
        (out / "index.json").write_text(json.dumps(index))

    return edit


def shard_of(out: Path) -> Path:
    return out / "train-00000.array_record"


# what is done to a packed set -> what is said of it
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda out: (out / "index.json").unlink(), "has no index.json: it was not packed to its end; pack it"),
    "nothing": (shutil.rmtree, "can't be read: No such file or directory; pack it again"),
    "no JSON": (lambda out: (out / "index.json").write_text("{"), "index.json is damaged; pack it again"),
    "a list": (lambda out: (out / "index.json").write_text("[]"), "index.json is damaged; pack it again"),
    "another file": (edited(lambda i: i.update(format="x")), "index.json is damaged"),
    "of tomorrow": (edited(lambda i: i.update(version=2)), "is of version 2, which this program does not know"),
    "fewer labels": (edited(lambda i: i["splits"]["train"]["labels"].pop()), "index.json is damaged"),
    "fewer records": (edited(lambda i: i["splits"]["train"]["shards"].clear()), "index.json is damaged"),
    "records without number": (
        edited(lambda i: i["splits"]["train"]["shards"][0].update(records=10**13)),
        "index.json is damaged",
    ),
    "records without end": (lambda out: (out / "index.json").write_text("[" * 200_000), "index.json is damaged"),
    "a label of no class": (edited(lambda i: i["splits"]["train"]["labels"].__setitem__(0, 7)), "has the label 7"),
    "a file elsewhere": (
        edited(lambda i: i["splits"]["train"]["shards"][0].update(file="../x")),
        "index.json is damaged",
    ),
    "no records": (lambda out: shard_of(out).unlink(), "train-00000.array_record is missing; pack it again"),
    "cut off": (lambda out: shard_of(out).write_bytes(shard_of(out).read_bytes()[:5000]), "has 5000 bytes, and index"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_set_is_named(case: str, small: Path, tmp_path: Path) -> None:
    change, message = DAMAGED[case]
    shutil.copytree(small, tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        open_source(f"packed:{tmp_path / 'out'}", "train")


def test_a_damaged_record_is_one_bad_picture(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "out")
    content = bytearray(shard_of(small).read_bytes())
    content[len(content) // 2] ^= 1
    shard_of(tmp_path / "out").write_bytes(content)
    source = open_source(f"packed:{tmp_path / 'out'}", "train")
    broken = []
    for number in range(len(source)):
        try:
            source[number]
        except decode.Unreadable as error:
            broken.append(str(error))
    assert len(broken) == 1
    assert "hash mismatch" in broken[0]


def test_a_run_is_bound_to_what_was_packed(small: Path, tmp_path: Path) -> None:
    def found(place: Path) -> dict[str, Any]:
        return fingerprint(open_source(f"packed:{place}", "train"), open_source(f"packed:{place}", ""))

    shutil.copytree(small, tmp_path / "moved")
    assert difference(found(small), found(tmp_path / "moved")) == ""
    change = edited(lambda index: index["splits"]["train"]["labels"].reverse())
    change(tmp_path / "moved")
    assert "have other names or labels" in difference(found(small), found(tmp_path / "moved"))


REFUSALS = {
    "data.pack folder:@/none --out @/out --size 40": "folder:@/none is no folder; ...",
    "data.pack what:x --out @/out --size 40": "unknown data source 'what:x'; ...",
    "data.pack sample --out @/out": "one of the arguments --size --jpeg is required; see ...",
    "data.pack sample --out @/out --size 0": "--size is 0; it must be 1 to 4096",
    "data.pack sample --out @/out --size 5000": "--size is 5000; it must be 1 to 4096",
    "data.pack sample --out @/out --size 40 --jpeg": "argument --jpeg: not allowed with argument --size; see ...",
    "data.pack sample --out @/out --size 40 --eval-fraction 1": "--eval-fraction is 1; it must be above 0, below 1",
    "data.pack sample --out @/file --size 40": "@/file can't be written: ...",
    "data.pack sample --out ftp://x/y --size 40": "ftp://x/y can't be used: ...",
    "data.pack sample --out @/full --size 40": "@/full is packed already; name another --out, or remove it",
}


@pytest.mark.parametrize("command", REFUSALS)
def test_what_can_not_be_packed_is_one_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/index.json").write_text("{}")
    assert_refused(command, REFUSALS[command], tmp_path)
    assert not (tmp_path / "out").exists()


def test_without_array_record_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="packed pictures need the package 'array_record'; use Linux"):
        pack("sample", tmp_path / "out", Form(SIZE), Options())


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Full:
        ArrayRecordWriter = staticmethod(lambda path, options: Full())
        write = staticmethod(lambda record: None)

        def close(self) -> None:
            raise RuntimeError("write() failed: No space left on device; writing /x; at byte 3; Failed to close")

    monkeypatch.setattr(records, "array_record", lambda: Full)
    message = "out can't be written: No space left on device; name another --out, or make room; the same command then"
    with pytest.raises(UserError, match=message):
        pack("sample", tmp_path / "out", Form(SIZE), Options())
    assert not [*(tmp_path / "out").iterdir()]


def test_a_packed_set_in_a_bucket_is_that_of_the_disk(google, place, small: Path, tmp_path: Path, monkeypatch) -> None:
    """Its files are copied once; another set at the same address is another copy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = folder_of(tmp_path / "data")
    status, said = run_command(f"data.pack {spec} --out {place} --size {SIZE}", tmp_path)
    assert (status, said) == (0, "")
    assert sorted(place.walk()) == ["index.json", "train-00000.array_record", "val-00000.array_record"]
    theirs = open_source(spec, "train")
    ours = open_source(f"packed:{place}", "train")
    same(ours, theirs)
    to_evaluate = EvalPlan(len(theirs), 8)
    for found, want in zip(batches(ours, to_evaluate, ()), batches(theirs, to_evaluate, ()), strict=True):
        np.testing.assert_array_equal(found["image"], want["image"])
    google.requests.clear()
    open_source(f"packed:{place}", "train")
    assert not [request for request in google.requests if "alt=media" in request and "array_record" in request]
    storage.remove_directory(place)
    with pytest.raises(UserError, match=f"packed:{place} can't be read: .*; pack it again"):
        open_source(f"packed:{place}", "train")
    pack(spec, place, Form(SIZE - 1), Options())
    again = open_source(f"packed:{place}", "train")
    assert again.files != ours.files  # type: ignore[attr-defined]
