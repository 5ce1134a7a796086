"""Images in files: torchvision's ImageFolder layout and order, every kind of pixel, the index and its cache."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from jaxsft.cli import UserError
from jaxsft.data import decode, folder, index
from jaxsft.data.base import Options
from jaxsft.data.folder import open_folder
from tests.files import picture, write


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train and val, two classes, nested folders, files that are none of our business."""
    for i, name in enumerate(["train/cat/b.png", "train/cat/a.JPG", "train/cat/x/c.webp", "train/dog/1.bmp"]):
        write(tmp_path / name, i, (20, 30 + i))
    for i, name in enumerate(["val/cat/1.png", "val/dog/2.jpeg", "val/dog/10.png"]):
        write(tmp_path / name, 10 + i)
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/cat/._a.jpg").write_text("what macOS leaves")
    (tmp_path / "train/.cache").mkdir()
    return tmp_path


def test_files_classes_and_order_are_those_of_image_folder(tree: Path):
    for split in ("train", "val"):
        ours = open_folder(str(tree), split, Options())
        theirs = datasets.ImageFolder(
            str(tree / split),
            is_valid_file=lambda p: Path(p).name[0] != "." and p.lower().endswith(folder.EXTENSIONS),
            allow_empty=True,
        )
        # torchvision lists the hidden folder as a class; numbers of classes shift by it.
        names = [c for c in theirs.classes if not c.startswith(".")]
        assert ours.class_names == tuple(names)
        assert [(p, names[label]) for p, label in zip(ours.paths, ours.labels, strict=True)] == [
            (p, theirs.classes[label]) for p, label in theirs.samples
        ]
        for i in range(len(ours)):
            np.testing.assert_array_equal(np.asarray(ours[i]), np.asarray(theirs[i][0]))
    assert open_folder(str(tree), "val", Options()).size == (20, 30)
    assert open_folder(str(tree), "train", Options()).size is None
    assert open_folder(str(tree), "", Options()).paths == open_folder(str(tree), "val", Options()).paths


def modes() -> dict[str, PIL.Image.Image]:
    rgb = PIL.Image.fromarray(picture())
    alpha = PIL.Image.merge("RGBA", [*rgb.split(), PIL.Image.fromarray(picture(seed=1)[..., 0])])
    transparent = rgb.quantize(16)
    transparent.info["transparency"] = bytes(range(16))
    return {
        "grey.png": rgb.convert("L"),
        "black-and-white.png": rgb.convert("1"),
        "palette.png": rgb.quantize(16),
        "transparent-palette.png": transparent,
        "alpha.png": alpha,
        "grey-alpha.png": alpha.convert("LA"),
        "alpha.webp": alpha,
        "cmyk.jpg": rgb.convert("CMYK"),
        "grey.jpg": rgb.convert("L"),
        "palette.bmp": rgb.quantize(16),
    }


@pytest.mark.filterwarnings("ignore:Palette images")  # PIL's, in the oracle
@pytest.mark.parametrize("name", modes())
def test_modes_become_rgb_as_in_torchvision(name: str, tmp_path: Path):
    modes()[name].save(tmp_path / name)
    want = datasets.folder.pil_loader(str(tmp_path / name))
    np.testing.assert_array_equal(np.asarray(decode.read_rgb(tmp_path / name)), np.asarray(want))
    np.testing.assert_array_equal(np.asarray(decode.read_rgb((tmp_path / name).read_bytes())), np.asarray(want))


def test_of_16_bits_the_upper_8_count(tmp_path: Path):
    wide = np.random.default_rng(0).integers(0, 65536, (20, 30), np.uint16)
    PIL.Image.fromarray(wide).save(tmp_path / "wide.png")
    got = np.asarray(decode.read_rgb(tmp_path / "wide.png"))
    np.testing.assert_array_equal(got, np.repeat((wide >> 8).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("mode", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
@pytest.mark.parametrize("size", [(20, 30), (300, 401), (401, 300), (256, 256), (255, 511), (640, 333)])
def test_resizing_is_torchvisions_to_the_last_bit(size: tuple[int, int], mode: InterpolationMode):
    image = PIL.Image.fromarray(picture(*size))
    for resize, crop in ((256, 224), (232, 224), (64, 64), (65, 32)):
        want = transforms.Compose([transforms.Resize(resize, mode), transforms.CenterCrop(crop)])(image)
        np.testing.assert_array_equal(decode.middle(image, resize, crop, mode.value), np.asarray(want))


def test_one_tree_is_divided_by_class(tmp_path: Path):
    for label, count in (("a", 20), ("b", 10)):
        for i in range(count):
            write(tmp_path / label / f"{i}.png", i)
    options = Options(eval_fraction=0.2, seed=1)
    train, val = (open_folder(str(tmp_path), split, options) for split in ("train", ""))
    assert np.bincount(train.labels).tolist() == [16, 8]
    assert np.bincount(val.labels).tolist() == [4, 2]
    assert not set(train.paths) & set(val.paths)
    assert open_folder(str(tmp_path), "val", options).paths == val.paths
    part = open_folder(str(tmp_path), "train[:12]", options)  # of a fixed random order: both classes, not the first 12
    assert len(part) == 12
    assert set(part.labels) == {0, 1}
    assert open_folder(str(tmp_path), "train[:12]+val", options).paths == part.paths + val.paths


def test_the_index_is_kept_until_files_change(tree: Path, monkeypatch: pytest.MonkeyPatch):
    measured: list[str] = []
    measure = index.measure
    monkeypatch.setattr(index, "measure", lambda path, *rest: measured.append(Path(path).name) or measure(path, *rest))

    def opened() -> list[str]:
        measured.clear()
        open_folder(str(tree), "train", Options())
        return sorted(measured)

    everything = ["1.bmp", "a.JPG", "b.png", "c.webp"]
    assert opened() == everything
    assert opened() == []
    write(tree / "train/dog/1.bmp", 5, (9, 9))
    assert opened() == ["1.bmp"]
    write(tree / "train/dog/new.png")
    assert opened() == ["new.png"]
    (tree / "train/dog/new.png").unlink()
    assert opened() == []
    assert [len(index.load(p)) for p in (index_files(tree))] == [5]
    for path in index_files(tree):
        path.write_bytes(path.read_bytes()[:100])  # a torn cache is no cache
    assert opened() == everything


def index_files(tree: Path) -> list[Path]:
    from jaxsft.models.weights import cache_dir

    return list((cache_dir() / "index").glob(f"{tree.name}-*.npz"))


def test_links_that_lead_back_are_not_followed(tree: Path, capfd: pytest.CaptureFixture):
    before = open_folder(str(tree), "train", Options()).paths
    (tree / "train/cat/loop").symlink_to(tree / "train/cat")
    (tree / "train/cat/x/up").symlink_to(tree / "train")
    write(tree / "val/dog/below/linked.png", 3)
    (tree / "train/dog/other").symlink_to(tree / "val/dog/below")
    after = open_folder(str(tree), "train", Options()).paths
    assert set(after) == {*before, str(tree / "train/dog/other/linked.png")}  # a link to elsewhere is followed
    assert "links back" in capfd.readouterr().err


def test_a_folder_that_cannot_be_read_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    scandir = os.scandir

    def refusing(path):  # the tests may run as root, whom no mode stops
        if str(path).endswith("train/cat/x"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"train/cat/x can't be read: Permission denied; make it readable"):
        open_folder(str(tree), "train", Options())
    assert len(open_folder(str(tree), "train", Options(on_error="skip"))) == 3
    assert "train/cat/x" in capfd.readouterr().err


WRONG = {
    "no folder": (lambda p: None, "folder:{p}/none is no folder", "{p}/none"),
    "empty": (lambda p: (p / "none").mkdir(), "holds no images", "{p}/none"),
    "no such split": (lambda p: None, "has no split 'test'", "{p}"),
    "class only in eval": (lambda p: write(p / "test/bird/1.png"), "has the class 'bird', which 'train' lacks", "{p}"),
    "empty class": (lambda p: (p / "train/fox").mkdir(), "train/fox holds no images", "{p}"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders(case: str, tree: Path):
    make, message, name = WRONG[case]
    make(tree)
    with pytest.raises(UserError, match=message.format(p=tree)):
        open_folder(name.format(p=tree), "test", Options())
