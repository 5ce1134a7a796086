"""`jaxsft.predict`: the same classes as the evaluation, on any picture; hostile ones are named, none crashes it."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms import functional as F  # noqa: N812  (as torchvision's users write it)

from jaxsft import cli, predict
from jaxsft import config as config_module
from jaxsft.data import decode
from jaxsft.data.augment import preprocess
from jaxsft.data.base import Options
from jaxsft.data.embedded import open_sample
from jaxsft.models.weights import INTERPOLATIONS, ModelCard, Preprocessing
from jaxsft.run import prediction, training
from jaxsft.run.saved import Run
from tests import small


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predict") / "run"
    training.train(small.config("--config.train.epochs=1"), path)
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


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_large_pictures_are_read_as_training_on_files_reads_them(interpolation: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "large.png")
    read = prediction.read_image(tmp_path / "large.png", Preprocessing(32, 28, interpolation=interpolation))
    middle = decode.middle(PIL.Image.fromarray(pixels), 32, 28, interpolation)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, middle)


@pytest.mark.parametrize("mode", [F.InterpolationMode.BILINEAR, F.InterpolationMode.BICUBIC])
@pytest.mark.parametrize("size", [(30, 41), (64, 64), (50, 33), (1, 1), (64, 300), (7, 900), (900, 7)])
def test_small_pictures_are_read_as_float_images(
    size: tuple[int, int], mode: F.InterpolationMode, tmp_path: Path
) -> None:
    """As torchvision resizes float images and as a run's evaluation does it on the device."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "small.png")
    to = Preprocessing(64, 56, (0.0, 0.0, 0.0), (1 / 255,) * 3, mode.value)
    read = prediction.read_image(tmp_path / "small.png", to)
    assert read.dtype == np.float32
    exact = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float64))
    want = F.center_crop(F.resize(exact, 64, mode, antialias=True).clip(0, 255), 56).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(read, want, atol=1e-3)  # PIL rounds to float32 between rows and columns
    # Places in float32 on a side of 8,000 px are off by 2**-11, and neighbours differ by up to 255.
    np.testing.assert_allclose(read, preprocess(pixels[None], to)[0], atol=2e-3 if max(size) < 100 else 0.2)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 8), (40, 32)])
def test_batches_of_one_shape(count: int, size: int, tmp_path: Path) -> None:
    """In the order of their names; unreadable ones take no place."""
    for i in range(count):
        PIL.Image.new("RGB", (20 + i, 30), (i, i, i)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "bad.png").write_text("no picture")
    paths = sorted(tmp_path.iterdir())
    made = prediction.batches(paths[: count + (count > 1)], Preprocessing(16, 16), True)
    found = [(names, batch.shape, batch[: len(names), 0, 0, 0].tolist()) for names, batch in made]
    assert {shape for _, shape, _ in found} == {(size, 16, 16, 3)}
    assert [name for names, _, _ in found for name in names] == list(map(str, paths[:count]))
    assert [level for _, _, levels in found for level in levels] == list(range(count))


class Mean:
    """A network that tells the mean of each channel."""

    def apply(self, variables: dict[str, float], images: jax.Array, train: bool) -> jax.Array:
        return images.mean((1, 2)) * variables["scale"]


def run_of_means(scale: float) -> Run:
    card = ModelCard("resnet18", 3, ("red", "green", "blue"), preprocessing=Preprocessing(24, 20))
    return Run(Path(), config_module.default(), card, Mean(), {"scale": scale}, 7)  # type: ignore[arg-type]


def test_pictures_of_many_sizes_take_one_compilation(tmp_path: Path) -> None:
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **rest: compiled.append(event) if event.endswith("jaxpr_to_mlir_module_duration") else None
    )
    for i in range(40):
        colour = tuple(np.roll((200, 100, 50), i))
        PIL.Image.new("RGB", (5 + 7 * i, 250 - 5 * i), colour).save(tmp_path / f"{i:02}.png")
    found = list(prediction.predict(run_of_means(1.0), sorted(tmp_path.iterdir()), 2))
    assert [entry["classes"][0]["class"] for entry in found] == [("red", "green", "blue")[i % 3] for i in range(40)]
    assert {len(entry["classes"]) for entry in found} == {2}
    assert len(compiled) == 1


def test_outputs_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    with pytest.raises(cli.UserError, match="of step 7 computes no numbers; take another --checkpoint"):
        list(prediction.predict(run_of_means(np.nan), [tmp_path / "a.png"], 1))


def test_folders_are_searched_as_for_training(tmp_path: Path, capfd) -> None:
    for name in ("b/2.png", "b/1.JPG", "a/3.jpeg", ".hidden/4.png", "._5.png", "6.txt", "7.bmp", "b.png/8.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "6.txt")
    found = prediction.find_images([tmp_path, tmp_path / "6.txt", tmp_path / "b" / "2.png"])
    names = ["7.bmp", "a/3.jpeg", "a/link.png", "b/1.JPG", "b/2.png", "b.png/8.webp", "6.txt"]
    assert [str(path.relative_to(tmp_path)) for path in found] == names
    assert "links back" in capfd.readouterr().err


def test_the_checkpoint_is_chosen(workdir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    PIL.Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    main(monkeypatch, "--workdir", workdir, "~/a.png", "--checkpoint", 3, "--json", "~/out.json")
    assert json.loads((tmp_path / "out.json").read_text())["step"] == 3
    for which, message in ((2, "no intact checkpoint of step 2"), ("new", "--checkpoint is 'new'")):
        with pytest.raises(cli.UserError, match=message):
            main(monkeypatch, "--workdir", workdir, tmp_path / "a.png", "--checkpoint", which)


@pytest.mark.parametrize("arguments", [("--workdir", "ftp://b/run", "a.png"), ("--workdir", "x", "http://b/a.png"),
                                       ("--workdir", "x", "a.png", "--json", "az://b/out")])  # fmt: skip
def test_addresses_are_refused(arguments: tuple[str, ...], monkeypatch) -> None:
    with pytest.raises(cli.UserError, match="can't be used: .*:// is not known"):
        main(monkeypatch, *arguments)


def test_a_file_of_predictions_is_refused_before_the_work(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(
        cli.UserError, match=r"none/out.json can't be written: No such file or directory; name another file"
    ):
        main(monkeypatch, "--workdir", "x", "a.png", "--json", tmp_path / "none" / "out.json")


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
    "empty.png": (b"", "an empty file"),
    "text.jpg": (b"#!/bin/sh\nrm -rf /\n", "not an image"),
    "cut.jpg": (encoded("JPEG")[:300], ""),
    "cut.webp": (encoded("WEBP")[:40], ""),
    "zeros.bmp": (bytes(5000), "not an image"),
    "lies.png": (png(40, 40, b"\0"), ""),
    "jpeg_header.jpg": (b"\xff\xd8\xff\xe0" + bytes(200), ""),
    "pickle.png": (b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.", "not an image"),
    "no_size.png": (png(0, 0), ""),
    "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n%%EndComments\n", "not an image"),
}


def test_hostile_images_are_named_and_left_out(workdir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for name, (content, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    PIL.Image.new("RGB", (40, 30)).save(tmp_path / "good.png")
    (tmp_path / "thin.png").write_bytes(png(120_000, 1, bytes(360_001)))
    main(monkeypatch, "--workdir", workdir, tmp_path)
    said = capsys.readouterr()
    good = [str(tmp_path / name) for name in ("good.png", "thin.png")]
    assert [line.partition(": ")[0] for line in said.out.splitlines()] == good
    warnings = {line.split("/")[-1].partition(": ")[0]: line for line in said.err.splitlines()}
    assert "links back" in warnings.pop(next(name for name in warnings if "links back" in warnings[name]))
    assert warnings.pop("pipe.png").endswith(": not a file")
    assert "no such file" in warnings.pop("gone.png")
    assert warnings.keys() == HOSTILE.keys()
    for name, (_, reason) in HOSTILE.items():
        assert warnings[name].startswith(f"warning: left out {tmp_path / name}: ")
        assert re.search(reason, warnings[name]), warnings[name]


def test_none_readable_is_an_error(workdir: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(cli.UserError, match="none of 1 images can be read; name JPEG, PNG, WEBP, BMP"):
        main(monkeypatch, "--workdir", workdir, tmp_path / "text.png", "--json", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_any_mode_and_any_name(workdir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    modes = ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F")
    for mode in modes:
        file = tmp_path / f"{mode.replace(';', '')} é\udcff.{'tiff' if mode in ('CMYK', 'F') else 'png'}"
        PIL.Image.new(mode, (33, 47)).save(file)
    main(monkeypatch, "--workdir", workdir, *tmp_path.iterdir())
    assert len(capsys.readouterr().out.splitlines()) == len(modes)
