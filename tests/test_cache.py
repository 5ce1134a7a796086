"""What is decoded once is kept: a batch read again is the same to the last bit, and whatever fails, the run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from jaxsft import storage
from jaxsft.bench.data import in_turns
from jaxsft.cli import UserError
from jaxsft.data import cache, decode, records
from jaxsft.data.base import Options, Source
from jaxsft.data.cache import Cache, open_cache
from jaxsft.data.loader import BadFiles, Stream, layout_of, make_loader
from jaxsft.data.order import Order
from jaxsft.data.packing import Form, pack
from jaxsft.data.reading import EvalPlan, Layout, Plan, TrainPlan
from jaxsft.data.sources import open_source
from jaxsft.models.weights import Preprocessing
from jaxsft.run.parallel import DataParallel
from tests.commands import hear_command
from tests.conftest import ROOT
from tests.files import write
from tests.pictures import Pictures
from tests.test_loader import host

DEVICES, TO, NUMBER, BATCH = DataParallel(), Preprocessing(40, 32), 24, 8
SIZES = ((60, 80), (90, 50), (41, 200), (64, 64), (20, 30))  # (height, width) px: larger, upright, long, small
PLANS: dict[str, tuple[Plan, tuple[str, ...]]] = {
    "train": (TrainPlan(Order(NUMBER, BATCH, 0)), ("random_resized_crop",)),
    "mixed": (TrainPlan(Order(NUMBER, BATCH, 0), partners=True), ()),
    "eval": (EvalPlan(NUMBER - 1, BATCH), ()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for i in range(NUMBER):
        write(root / "train" / "ab"[i % 2] / f"{i}.png", i, SIZES[i % len(SIZES)])
    write(root / "val/a/1.png")
    return root


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that this process decodes from now on."""
    found: list[str] = []
    real = decode.read_rgb

    def read(file: Any, upright: bool = True) -> PIL.Image.Image:
        found.append(str(file))
        return real(file, upright)

    monkeypatch.setattr(decode, "read_rgb", read)
    return found


def loader(source: Source, plan: Plan, names: tuple[str, ...], place: Path | str = "", **options: Any) -> Stream:
    options = {"workers": 0, "cache": str(place), **options}
    found = make_loader(source, plan, DEVICES, TO, augmentations=names, **options)
    assert isinstance(found, Stream)
    return found


def assert_same(found: Any, wanted: Any) -> None:
    found, wanted = host(found), host(wanted)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("kind", PLANS)
def test_the_second_pass_is_read_from_the_cache(kind: str, folder: Path, tmp_path: Path, reads: list[str]) -> None:
    """And the first of a later run; what comes is what comes without one."""
    plan, names = PLANS[kind]
    source = open_source(f"folder:{folder}", "train")
    source = source.select(np.arange(plan.size)) if isinstance(plan, EvalPlan) else source
    plain, kept = loader(source, plan, names), loader(source, plan, names, tmp_path / "cache")
    for step in range(3):
        assert_same(kept.batch(step), plain.batch(step))
    reads.clear()
    again = loader(source, plan, names, tmp_path / "cache")
    kept.close()
    for one in (kept, again):
        for step in range(3) if isinstance(plan, EvalPlan) else range(3, 6):
            before = len(reads)
            found = one.batch(step)
            assert len(reads) == before
            assert_same(found, plain.batch(step))
    assert [*(tmp_path / "cache").rglob("*.array_record")]


def test_it_goes_by_what_pixels_depend_on(folder: Path, tmp_path: Path) -> None:
    """The files, their times, how they are turned, the size and the interpolation: else it is another folder."""
    source = open_source(f"folder:{folder}", "train")
    layout = layout_of(source, TO, ())[0]
    keys = [cache.key_of(source, layout)]
    assert keys[0] == cache.key_of(open_source(f"folder:{folder}", "train"), dataclasses.replace(layout))
    others = [
        layout_of(source, TO, ("random_resized_crop",))[0],
        dataclasses.replace(layout, interpolation="bicubic"),
        dataclasses.replace(layout, shape=(31, 31)),
        dataclasses.replace(layout, resize=41),
    ]
    keys += [cache.key_of(source, other) for other in others]
    keys += [cache.key_of(open_source(f"folder:{folder}", "train", Options(upright=False)), layout)]
    keys += [cache.key_of(source.select(np.arange(5)), layout), cache.key_of(source.select(np.arange(1, 6)), layout)]
    file = folder / "train/a/0.png"
    os.utime(file, ns=(1, 1))
    keys += [cache.key_of(open_source(f"folder:{folder}", "train"), layout)]
    assert len(set(keys)) == len(keys)


def test_what_is_decoded_already_or_has_no_names_is_not_kept(folder: Path, tmp_path: Path, capsys) -> None:
    pack(f"folder:{folder}", tmp_path / "packed", Form(40), Options())
    source = open_source(f"packed:{tmp_path / 'packed'}", "train")
    layout = layout_of(source, TO, ())[0]
    assert open_cache(str(tmp_path / "cache"), source, layout) is None
    assert capsys.readouterr().err == ""
    assert open_cache(str(tmp_path / "cache"), Pictures(np.zeros(3, np.int32)), layout) is None
    expected = "warning: data.cache: the images of a Pictures have no names to know them by: none is kept\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(UserError, match="ftp://x can't be used"):
        open_cache("ftp://x", open_source(f"folder:{folder}", "train"), layout)


def rows(number: int) -> bytes:
    return bytes([number]) * 10


def test_processes_that_share_it_write_what_is_not_there_and_see_what_others_wrote(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "LOOK_SECONDS", 0)
    one, other = Cache(tmp_path), Cache(tmp_path)
    for number in range(5):
        one.put(number, rows(number))
    assert one.get(3) == rows(3)
    assert other.get(3) is None
    one.flush()
    assert other.get(3) == rows(3)
    for number in range(3, 8):
        other.put(number, rows(number))
    other.flush()
    assert [one.get(number) for number in range(8)] == [rows(number) for number in range(8)]
    assert one.get(8) is None
    files = [*tmp_path.iterdir()]
    assert sorted(records.count(file) for file in files) == [4, 6]  # 5, 6, 7; 0 to 4; and the numbers of each
    one.flush()
    assert [*tmp_path.iterdir()] == files


def test_files_are_written_where_a_pass_ends_or_enough_is_gathered(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "FILE_BYTES", 45)
    kept, counts = Cache(tmp_path), []
    for step in (0, 2, 4, 6, 8):  # of a worker that has every second step; a pass is 3 steps
        kept.at(step, 3)
        counts.append(len([*tmp_path.iterdir()]))
        kept.put(step, rows(step))
    assert counts == [0, 0, 1, 2, 2]
    for number in range(10, 15):
        kept.put(number, rows(number))
    assert len([*tmp_path.iterdir()]) == 3
    for step, files in ((9, 4), (11, 4), (9, 5)):  # the last is an evaluation that begins again
        kept.at(step, 3)
        assert len([*tmp_path.iterdir()]) == files
        kept.put(20 + step + files, rows(step))


def test_a_damaged_file_is_done_without(tmp_path: Path) -> None:
    kept = Cache(tmp_path)
    for number in range(4):
        kept.put(number, records.on_its_side(np.full((9, 9, 3), number, np.uint8), (9, 9)).to_bytes())
    kept.flush()
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[content.index(bytes([2]) * 200) + 50] ^= 1
    (tmp_path / f"a{records.SUFFIX}").write_bytes(content)
    file.unlink()
    records.reader.cache_clear()
    (tmp_path / f"cut{records.SUFFIX}").write_bytes(content[:3000])
    (tmp_path / f"empty{records.SUFFIX}").write_bytes(b"")
    (tmp_path / f"text{records.SUFFIX}").write_text("no records at all" * 99)
    (tmp_path / "notes.txt").write_text("not ours")
    again = Cache(tmp_path)
    assert [again.get(number) is None for number in range(5)] == [False, False, True, False, True]
    again.put(2, b"mended")
    again.flush()
    assert again.get(2) == b"mended"
    layout = Layout("middle", (32, 32), 40)
    with pytest.raises(decode.Unreadable, match="of another size"):
        layout.restore(records.from_bytes(again.get(3) or b""), np.empty((32, 32, 3), np.uint8))


def refuse(path: Any, contents: Any) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_a_disk_that_fills_is_one_line(workers: int, folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The run goes on without, with all its batches."""
    if workers:
        options: dict[str, Any] = {"workers": 2}
    else:
        monkeypatch.setattr(records, "write_shard", refuse)
        options = {}
    plan, names = PLANS["train"]
    source = open_source(f"folder:{folder}", "train")
    plain, kept = loader(source, plan, names), loader(source, plan, names, tmp_path / "cache", **options)
    if workers:  # processes of their own: there the folder goes away
        kept.reader.cache.place = kept.reader.cache.folder = tmp_path / "gone" / "x"  # type: ignore[union-attr]
        (tmp_path / "gone").write_text("a file")
    for step in range(9):
        assert_same(kept.batch(step), plain.batch(step))
    kept.close()
    assert workers or kept.reader.cache.writes is False  # type: ignore[union-attr]
    lines = [line for line in capsys.readouterr().err.splitlines() if "data.cache" in line]
    why = "Not a directory" if workers else "No space left on device"
    where = tmp_path / ("gone" if workers else "cache")
    assert lines == [f"warning: data.cache {where} can't be written ({why}): the run goes on without it"]


def test_a_folder_that_can_not_be_written_is_read(folder: Path, tmp_path: Path, monkeypatch, capsys, reads) -> None:
    plan, names = PLANS["eval"]
    source = open_source(f"folder:{folder}", "train").select(np.arange(23))
    first = loader(source, plan, names, tmp_path / "cache")
    assert len([*first.batches()]) == 3
    first.close()

    def read_only(place: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "try_to_write", read_only)
    reads.clear()
    assert len([*loader(source, plan, names, tmp_path / "cache").batches()]) == 3
    assert reads == []
    line = f"warning: data.cache {tmp_path}/cache can't be written (Permission denied): the run goes on without it\n"
    assert capsys.readouterr().err == line
    (tmp_path / "file").write_text("")
    assert len([*loader(source, plan, names, tmp_path / "file").batches()]) == 3
    assert len(reads) == 23
    assert "can't be written (Not a directory)" in capsys.readouterr().err


def test_what_was_never_finished_is_removed_when_nobody_can_want_it(folder: Path, tmp_path: Path) -> None:
    source = open_source(f"folder:{folder}", "train")
    layout = layout_of(source, TO, ())[0]
    kept = open_cache(str(tmp_path), source, layout)
    assert kept is not None and isinstance(kept.place, Path)
    old, new = (kept.place / f".{name}{records.SUFFIX}" for name in ("old", "new"))
    for file, age in ((old, 2 * cache.ABANDONED_SECONDS), (new, 60.0)):
        file.write_text("x")
        os.utime(file, (time.time() - age,) * 2)
    open_cache(str(tmp_path), source, layout)
    assert [*kept.place.iterdir()] == [new]


def test_a_broken_image_stays_one(folder: Path, tmp_path: Path) -> None:
    """It is named in each pass, and its substitute is not kept in its place."""
    plan, names = PLANS["eval"]
    source = open_source(f"folder:{folder}", "train").select(np.arange(23))
    broken = dataclasses.replace(source, paths=(*source.paths[:4], str(tmp_path / "gone.png"), *source.paths[5:]))  # type: ignore[type-var, attr-defined]
    for _ in range(2):
        bad = BadFiles("skip")
        stream = loader(broken, plan, names, tmp_path / "cache", bad=bad)
        masks = np.concatenate([host(batch)["mask"] for batch in stream.batches()])
        stream.close()
        assert np.flatnonzero(~masks).tolist() == [4, 23]
        assert [*bad.found] == [str(tmp_path / "gone.png")]


def test_worker_processes_share_it(folder: Path, tmp_path: Path) -> None:
    plan, names = PLANS["train"]
    source = open_source(f"folder:{folder}", "train")
    plain, kept = loader(source, plan, names), loader(source, plan, names, tmp_path / "cache", workers=2)
    for step in range(9):
        assert_same(kept.batch(step), plain.batch(step))
    kept.close()
    (place,) = (tmp_path / "cache").iterdir()
    later = Cache(place)
    assert [number for number in range(NUMBER) if later.get(number) is None] == []


KILLED = """
import sys
from jaxsft.data.cache import Cache
from pathlib import Path
kept = Cache(Path(sys.argv[1]))
for number in range(50):
    kept.put(number, bytes(100))
    if number == 20:
        kept.flush()
print("ready", flush=True)
import time; time.sleep(60)
"""


def test_a_process_that_is_killed_loses_what_it_had_gathered(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.kill()
    later = Cache(tmp_path)
    assert [later.get(number) is not None for number in range(50)] == [number <= 20 for number in range(50)]


def test_a_cache_in_a_bucket(google, place, folder: Path, tmp_path: Path, monkeypatch, reads, capsys) -> None:
    """Another machine, which has no copies, reads what this one wrote; a bucket that can't be written is one line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    plan, names = PLANS["train"]
    source = open_source(f"folder:{folder}", "train")
    first = loader(source, plan, names, str(place))
    for step in range(4):
        first.batch(step)
    first.close()
    assert len(place.walk()) == 1
    source = open_source(f"folder:{folder}", "train")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    reads.clear()
    second = loader(source, plan, names, str(place))
    for step in range(3):
        second.batch(step)
    assert reads == []
    monkeypatch.setattr(google, "read_only", True)
    assert open_cache(str(place), source, Layout("middle", (8, 8), 8)).writes is False  # type: ignore[union-attr]
    assert capsys.readouterr().err.startswith(f"warning: data.cache {place} can't be written (")


@pytest.mark.full
def test_the_bench_says_what_comes_from_the_second_epoch_on(tmp_path: Path) -> None:
    command = "bench data --images 60 --batch-size 4 --image-size 32 --workers 0 --passes 1 --packed --json @/data.json"
    status, said, _ = hear_command(command, tmp_path)
    assert status == 0
    assert len(said.splitlines()) == 2 and " packed " in said
    measured = json.loads((tmp_path / "data.json").read_text())
    assert [*measured["train"]["images_per_sec"]] == [*measured["eval"]["images_per_sec"]] == ["jaxsft", "packed"]
    feeds = {name: lambda: iter([2] * 9) for name in ("jaxsft", "packed", "torch")}
    ratios = in_turns(feeds, 1)
    speeds = ratios["images_per_sec"]
    assert ratios["ratio"] == speeds["jaxsft"] / speeds["torch"]
    assert ratios["packed_ratio"] == speeds["packed"] / speeds["torch"]
