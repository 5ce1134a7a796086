"""The index: every file is decoded once before a run; its cache is an aid, never a condition."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from jaxsft.data import decode, index
from jaxsft.data.threads import cores


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index.warn_once.cache_clear()


def folder(tmp_path: Path, count: int = 12) -> tuple[Path, list[str]]:
    root = tmp_path / "data"
    root.mkdir(exist_ok=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), np.uint8)
        PIL.Image.fromarray(noise).save(root / f"{i:02}.jpg", quality=95)
    return root, sorted(map(str, root.iterdir()))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded."""
    names: list[str] = []
    read_rgb = decode.read_rgb
    monkeypatch.setattr(decode, "read_rgb", lambda p, *rest: names.append(Path(p).name) or read_rgb(p, *rest))
    return names


def test_a_cut_off_file_is_found_once(tmp_path: Path, read: list[str]):
    root, paths = folder(tmp_path)
    whole = Path(paths[3]).read_bytes()
    Path(paths[3]).write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        found = index.index(root, "train", paths, True)
        assert "truncated" in found.errors[3]
        assert [i for i, error in enumerate(found.errors) if error] == [3]
        assert found.sizes.tolist() == [[0, 0] if i == 3 else [20 + i, 30] for i in range(12)]
        assert len(read) == 12
    Path(paths[3]).write_bytes(whole)
    assert index.index(root, "train", paths, True).errors == [""] * 12
    assert len(read) == 13


def test_what_splits_share_is_decoded_once(tmp_path: Path, read: list[str]):
    """A file may be listed twice, too; another orientation is another size."""
    root, paths = folder(tmp_path)
    index.index(root, "train[:4]", [*paths[:4], paths[0]], True)
    assert index.index(root, "train", paths, True).sizes.shape == (12, 2)
    assert sorted(read) == [Path(path).name for path in paths]
    index.index(root, "train", paths, False)
    assert len(read) == 24
    os.unlink(paths[0])
    PIL.Image.new("RGB", (5, 5)).save(paths[1])
    index.index(root, "train", paths[1:], True)
    assert sorted({len(index.load(path)) for path in (tmp_path / "cache").rglob("*.npz")}) == [11, 12]
    assert index.index(root, "none", [], True).sizes.shape == (0, 2)


def test_threads_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As many as there are cores, all at once."""
    root, paths = folder(tmp_path)
    meeting, read_rgb = threading.Barrier(cores(), timeout=30), decode.read_rgb
    monkeypatch.setattr(decode, "read_rgb", lambda *a: (meeting.wait(), read_rgb(*a))[1])
    many = paths[: 12 // cores() * cores()]
    assert index.index(root, "train", many, True).errors == [""] * len(many)


def test_what_is_the_systems_fault_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]):
    root, paths = folder(tmp_path)
    opened = PIL.Image.open

    def refusing(file, **options):  # the tests may run as root, whom no mode stops
        if str(file) == paths[2]:
            raise PermissionError(13, "Permission denied")
        if str(file) == paths[5]:
            raise MemoryError
        return opened(file, **options)

    monkeypatch.setattr(PIL.Image, "open", refusing)
    found = index.index(root, "train", [*paths, str(root / "none.png")], True)
    assert [found.errors[i] for i in (2, 5, 12)] == ["Permission denied", "it does not fit into memory", "no such file"]
    monkeypatch.setattr(PIL.Image, "open", opened)
    read.clear()
    assert index.index(root, "train", paths, True).errors == [""] * 12
    assert sorted(read) == ["02.jpg", "05.jpg"]


def test_interrupted_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]):
    root, paths = folder(tmp_path)
    measure = index.measure

    def interrupting(path: str, upright: bool):
        if path == paths[8]:
            raise KeyboardInterrupt
        return measure(path, upright)

    monkeypatch.setattr(index, "measure", interrupting)
    with pytest.raises(KeyboardInterrupt):
        index.index(root, "train", paths, True)
    monkeypatch.setattr(index, "measure", measure)
    read.clear()
    assert index.index(root, "train", paths, True).errors == [""] * 12
    assert sorted(read) == [f"{i:02}.jpg" for i in range(8, 12)]


def test_names_of_any_bytes(tmp_path: Path, read: list[str]):
    root = tmp_path / "data"
    root.mkdir()
    for name in ("a\udcff.png", "b\n.png", "é" * 80 + ".png"):
        PIL.Image.new("RGB", (4, 4)).save(root / name)
    (root / "c\udcfe.png").write_text("none")
    paths = sorted(map(str, root.iterdir()))
    first, again = (index.index(root, "train", paths, True) for _ in range(2))
    assert first.errors == again.errors
    assert sum(map(bool, again.errors)) == 1
    assert len(read) == 4


def test_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """Where it can't be written one line says so, for all splits; where it is torn it is made anew."""
    root, paths = folder(tmp_path, 3)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for part in ("train", "val"):
        assert index.index(root, part, paths, True).errors == [""] * 3
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning: " in line]
    assert len(warnings) == 1
    assert "can't be written (Not a directory): done without" in warnings[0]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = index.index(root, "train", paths, True).sizes.tolist()
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    content = kept.read_bytes()
    for torn in (b"", content[:100], content[:-40], b"no archive", content.replace(b"sizes", b"sixes")):
        kept.write_bytes(torn)
        assert index.index(root, "train", paths, True).sizes.tolist() == sizes
        assert kept.read_bytes() == content
    assert os.listdir(kept.parent) == [kept.name]
