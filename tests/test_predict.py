"""`jaxsft.predict`: the same classes as the evaluation, on any picture; hostile ones are named, none crashes it."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from jaxsft import cli, predict, train
from jaxsft.data import decode
from jaxsft.data.augment import preprocess
from jaxsft.data.base import Options
from jaxsft.data.embedded import open_sample
from jaxsft.workdir import load_run
from tests import small


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predict") / "run"
    train.train(small.config("--config.train.epochs=1"), path)
    return path


def main(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    predict.main()


def test_says_what_the_evaluation_counts(workdir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The sample's test images as files: as many right as the run's own evaluation of them found."""
    source = open_sample("", "test[:40]", Options())
    for number, image in enumerate(source.images):
        PIL.Image.fromarray(image).save(tmp_path / f"{number:03}.png")
    main(monkeypatch, "--workdir", workdir, tmp_path, "--json", tmp_path / "out.json", "--topk", 3)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["step"] == 4
    assert [entry["file"] for entry in found["images"]] == [str(tmp_path / f"{n:03}.png") for n in range(40)]
    names = [entry["classes"][0]["class"] for entry in found["images"]]
    right = sum(name == source.class_names[label] for name, label in zip(names, source.labels, strict=True))
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert right == round(last["accuracy"] * 40)
    assert all(len(entry["classes"]) == 3 for entry in found["images"])
    probabilities = [entry["classes"][0]["probability"] for entry in found["images"]]
    assert all(0.1 < p <= 1 for p in probabilities)
    assert len(capsys.readouterr().out.splitlines()) == 40


def test_large_pictures_are_read_as_training_on_files_reads_them(workdir: Path, tmp_path: Path) -> None:
    to = load_run(workdir).card.preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "large.png")
    read = predict.read_image(tmp_path / "large.png", to)
    middle = decode.middle(PIL.Image.fromarray(pixels), to.resize_size, to.crop_size)
    # float32 rounding of values up to 3
    np.testing.assert_allclose(read, preprocess(middle[None], to)[0], rtol=0, atol=1e-6)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG file that claims to be so large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(out, kind)
    return out.getvalue()


# file -> what the warning says of it
HOSTILE = {
    "bomb.png": (png(60_000, 60_000), r"Image size \(3600000000 pixels\) exceeds limit"),
    "thin.png": (png(120_000, 1, bytes(360_001)), r"120000 x 1 px is too long and thin"),
    "empty.png": (b"", "not an image"),
    "text.jpg": (b"#!/bin/sh\nrm -rf /\n", "not an image"),
    "cut.jpg": (encoded("JPEG")[:300], ""),
    "cut.webp": (encoded("WEBP")[:40], ""),
    "zeros.bmp": (bytes(5000), "not an image"),
    "lies.png": (png(40, 40, b"\0"), ""),
    "jpeg_header.jpg": (b"\xff\xd8\xff\xe0" + bytes(200), ""),
    "pickle.png": (b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.", "not an image"),
    "no_size.png": (png(0, 0), ""),
    "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n%%EndComments\n", ""),
}


def test_hostile_images_are_named_and_left_out(workdir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for name, (content, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    PIL.Image.new("RGB", (40, 30)).save(tmp_path / "good.png")
    main(monkeypatch, "--workdir", workdir, tmp_path)
    said = capsys.readouterr()
    assert [line.partition(": ")[0] for line in said.out.splitlines()] == [str(tmp_path / "good.png")]
    warnings = {line.split("/")[-1].partition(": ")[0]: line for line in said.err.splitlines()}
    assert warnings.keys() == HOSTILE.keys()
    for name, (_, reason) in HOSTILE.items():
        assert warnings[name].startswith(f"warning: left out {tmp_path / name}: ")
        assert re.search(reason, warnings[name]), warnings[name]


def test_none_readable_is_an_error(workdir: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(cli.UserError, match="none of 1 images can be read; name JPEG, PNG, WebP or BMP files"):
        main(monkeypatch, "--workdir", workdir, tmp_path / "text.png", "--json", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_any_mode_and_any_name(workdir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    modes = ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F")
    for mode in modes:
        file = tmp_path / f"{mode.replace(';', '')} é\udcff.{'tiff' if mode in ('CMYK', 'F') else 'png'}"
        PIL.Image.new(mode, (33, 47)).save(file)
    main(monkeypatch, "--workdir", workdir, *tmp_path.iterdir())
    assert len(capsys.readouterr().out.splitlines()) == len(modes)
