"""Decoding: which way up, which formats, and pictures of any shape in little memory."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin
import pytest
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from jaxsft.data import decode
from jaxsft.data.base import Options
from jaxsft.data.folder import open_folder

ORIENTATION = 0x0112
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def picture(height: int = 20, width: int = 30, seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def exif(orientation: int) -> bytes:
    tags = PIL.Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


def late_exif(path: Path, orientation: int) -> None:
    """A PNG whose eXIf chunk comes after the pixels."""
    picture().save(path)
    content, data = path.read_bytes(), b"eXIf" + exif(orientation).removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    path.write_bytes(content[:-12] + chunk + content[-12:])  # before IEND


def raw_profile(path: Path, orientation: int) -> None:
    """A PNG as ImageMagick writes EXIF: in hexadecimal digits."""
    info, data = PIL.PngImagePlugin.PngInfo(), exif(orientation)
    info.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
    picture().save(path, pnginfo=info)


def png_xmp(path: Path, orientation: int) -> None:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.format(orientation))
    picture().save(path, pnginfo=info)


KINDS = {
    "exif.jpg": lambda path, o: picture().save(path, exif=exif(o)),
    "exif.png": lambda path, o: picture().save(path, exif=exif(o)),
    "exif.webp": lambda path, o: picture().save(path, exif=exif(o), lossless=True),
    "exif.tif": lambda path, o: picture().save(path, exif=exif(o)),
    "xmp.jpg": lambda path, o: picture().save(path, xmp=XMP.format(o).encode()),
    "xmp.webp": lambda path, o: picture().save(path, xmp=XMP.format(o).encode(), lossless=True),
    "xmp.png": png_xmp,
    "late.png": late_exif,
    "raw.png": raw_profile,
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_turned_as_they_say(kind: str, tmp_path: Path):
    """As `exif_transpose` of the loaded picture, whatever says so and wherever in the file; else as torchvision."""
    path = tmp_path / kind
    for orientation in range(1, 9):
        KINDS[kind](path, orientation)
        with PIL.Image.open(path) as image:
            image.load()
            want = PIL.ImageOps.exif_transpose(image).convert("RGB")
        assert want.size == ((20, 30) if orientation > 4 else (30, 20))
        for file in (path, path.read_bytes()):
            np.testing.assert_array_equal(np.asarray(decode.read_rgb(file)), np.asarray(want))
            plain = datasets.folder.pil_loader(str(path))  # PIL turns a TIFF in any case
            np.testing.assert_array_equal(np.asarray(decode.read_rgb(file, upright=False)), np.asarray(plain))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("upright", [True, False])
def test_a_turned_picture_among_those_of_one_size(kind: str, upright: bool, tmp_path: Path):
    """The size that the set is said to have is that of the pixels that it brings."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(3):
        picture(seed=i).save(tmp_path / "train" / "a" / f"{i}.png")
    KINDS[kind](tmp_path / kind, 6)
    (tmp_path / kind).rename(tmp_path / "train" / "a" / "turned.jpg")  # what it is does not go by its name
    source = open_folder(str(tmp_path), "train", Options(upright=upright, divide=False))
    sizes = {source[i].size for i in range(4)}
    assert source.size == (next(iter(sizes))[::-1] if len(sizes) == 1 else None)
    assert len(sizes) == (2 if upright or kind == "exif.tif" else 1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # in the oracle
@pytest.mark.parametrize("broken", [b"Exif\0\0II", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + b"x" * 40])
def test_a_picture_with_broken_exif_is_taken_as_it_lies(broken: bytes, tmp_path: Path):
    picture().save(tmp_path / "a.jpg", exif=broken)
    plain = datasets.folder.pil_loader(str(tmp_path / "a.jpg"))
    np.testing.assert_array_equal(np.asarray(decode.read_rgb(tmp_path / "a.jpg")), np.asarray(plain))
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n       2\nzz\n")
    picture().save(tmp_path / "b.png", pnginfo=info)
    np.testing.assert_array_equal(np.asarray(decode.read_rgb(tmp_path / "b.png")), np.asarray(picture()))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(%pipe%touch /tmp/x) (w) file\n%%EOF\n"


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.eps"])
def test_an_eps_is_not_tried_whatever_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import PIL.EpsImagePlugin

    called: list[str] = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *a, **k: called.append("Ghostscript"))
    PIL.Image.init()
    monkeypatch.setattr(PIL.Image, "ID", [*PIL.Image.ID, "OTHER"])
    monkeypatch.setitem(PIL.Image.OPEN, "OTHER", (lambda *a: called.append("OTHER"), lambda prefix: True))
    (tmp_path / name).write_bytes(EPS)
    for file in (tmp_path / name, EPS):
        with pytest.raises(decode.Unreadable, match="not an image, or none of JPEG"):
            decode.read_rgb(file)
    assert called == []


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "PPM", "TIFF", "GIF"])
def test_formats_that_are_read(kind: str, tmp_path: Path):
    """By their content, whatever the name; of several pictures the first."""
    options = {"save_all": True, "append_images": [picture(seed=1)]} if kind in ("MPO", "GIF", "TIFF") else {}
    picture().save(tmp_path / "a.dat", kind, **options)
    want = datasets.folder.pil_loader(str(tmp_path / "a.dat"))
    np.testing.assert_array_equal(np.asarray(decode.read_rgb(tmp_path / "a.dat")), np.asarray(want))


def in_two_passes(image: PIL.Image.Image, resize: int, mode: InterpolationMode, columns_first: bool) -> PIL.Image.Image:
    """`Resize(resize, mode)`, PIL's two passes in the order that is asked for instead of the one that it chooses."""
    (width, height), short = image.size, min(image.size)
    size = (resize * width // short, resize * height // short)
    half_way = (width, size[1]) if columns_first else (size[0], height)
    return image.resize(half_way, decode.resampling(mode.value)).resize(size, decode.resampling(mode.value))


# A level: resized alone the strip lies elsewhere by rounding. Bicubic weights add up to 1.25 without their signs, which
# makes a second one of it.
LONG_PICTURES = ((InterpolationMode.BILINEAR, 1), (InterpolationMode.BICUBIC, 2))


@pytest.mark.parametrize(("mode", "bound"), LONG_PICTURES)
@pytest.mark.parametrize(("resize", "crop"), [(32, 28), (64, 64), (65, 60)])
def test_the_middle_of_long_pictures_is_torchvisions(
    resize: int, crop: int, mode: InterpolationMode, bound: int, monkeypatch: pytest.MonkeyPatch
):
    """Within the bound of it; bicubic in one of the two orders of PIL's passes, of which it may choose the other."""
    monkeypatch.setattr(decode, "LONG", 4)  # pictures that can be resized whole too
    random = np.random.default_rng(resize)
    transform = transforms.Compose([transforms.Resize(resize, mode), transforms.CenterCrop(crop)])
    for _ in range(40):
        short = int(random.integers(1, 200))
        size = (short, int(short * random.uniform(1, 40)) + 1)
        image = picture(*(size if random.random() < 0.5 else size[::-1]), seed=short)
        found = decode.middle(image, resize, crop, mode.value).astype(int)
        off = np.abs(found - np.asarray(transform(image))).max()
        if max(size) <= decode.LONG * short:
            assert off == 0
            continue
        if mode == InterpolationMode.BICUBIC:
            wholes = [transforms.CenterCrop(crop)(in_two_passes(image, resize, mode, order)) for order in (False, True)]
            off = min(np.abs(found - np.asarray(whole)).max() for whole in wholes)
        assert off <= bound
        # Without roundings to whole levels what is left is the place of the strip, to 4e-5 px, and all that the kernel
        # reaches is in it.
        floats = image.getchannel(0).convert("F")
        whole = transforms.Resize(resize, mode)(floats)
        left, top = (round((side - crop) / 2) for side in whole.size)
        want = np.asarray(whole.crop((left, top, left + crop, top + crop)))
        np.testing.assert_allclose(decode.middle(floats, resize, crop, mode.value), want, rtol=0, atol=1e-2)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 900_000)])
def test_thin_pictures_take_little_memory(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """Neither the middle nor a canvas makes more pixels on the way than a few times those that it wants."""
    made: list[int] = []
    resize = PIL.Image.Image.resize

    def spy(image: PIL.Image.Image, sides: tuple[int, int], *rest):
        made.append(sides[0] * sides[1])
        return resize(image, sides, *rest)

    monkeypatch.setattr(PIL.Image.Image, "resize", spy)
    image = picture(*size)
    tracemalloc.start()
    for interpolation in decode.REACH:
        for turned in (image, image.convert("F")):
            assert decode.middle(turned, 256, 224, interpolation).shape[:2] == (224, 224)
        decode.onto_canvas(image, np.empty((256, 384, 3), np.uint8), interpolation)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert max(made) <= 256 * 384


@pytest.mark.parametrize("interpolation", decode.REACH)
@pytest.mark.parametrize("size", [(90, 100), (100, 90), (400, 90), (30, 50)])
def test_a_canvas_holds_the_picture_as_pil_resizes_it(size: tuple[int, int], interpolation: str):
    """Smaller pictures as they are, upright ones on their side, and no kernel but the one that is asked for."""
    image, laid = picture(*size), np.empty((64, 96, 3), np.uint8)
    height, width, rows, columns = decode.onto_canvas(image, laid, interpolation)
    upright = height > width
    if min(size) > 64:
        image = image.resize((rows, columns) if upright else (columns, rows), decode.resampling(interpolation))
    want = np.asarray(image)
    np.testing.assert_array_equal(laid[:rows, :columns], want.swapaxes(0, 1) if upright else want)
    assert not laid[rows:].any()
    assert not laid[:, columns:].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "not a file"),
        (lambda p: p.write_bytes(b""), "an empty file"),
        (lambda p: p.symlink_to(p), "Too many levels of symbolic links"),
    ],
)
def test_the_cause_is_named(make, message: str, tmp_path: Path):
    make(tmp_path / "a.png")
    with pytest.raises(decode.Unreadable, match=message):
        decode.read_rgb(tmp_path / "a.png")
