"""`jaxsft.predict`: the same classes as the evaluation, on any picture; hostile ones are named, none crashes it."""

from __future__ import annotations

import csv
import dataclasses
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
from torchvision.transforms import functional as F  # noqa: N812  (as torchvision's users write it)

from jaxsft import cli, predict
from jaxsft import config as config_module
from jaxsft.data import loose
from jaxsft.data.augment import preprocess
from jaxsft.data.base import Options
from jaxsft.data.embedded import open_sample
from jaxsft.data.loader import BadFiles
from jaxsft.models.weights import INTERPOLATIONS, ModelCard, Preprocessing
from jaxsft.run import evaluation, prediction, training
from jaxsft.run.parallel import DataParallel
from jaxsft.run.saved import Run, load_run
from tests import small
from tests.commands import hear_command
from tests.files import write
from tests.tiny import compiled


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predict") / "run"
    training.train(small.config("--config.train.epochs=1"), path)
    return path


def main(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    return predict.main()


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


@pytest.mark.parametrize("mode", [F.InterpolationMode.BILINEAR, F.InterpolationMode.BICUBIC])
@pytest.mark.parametrize("size", [(50, 90), (33, 20), (64, 64), (1, 1), (300, 64)])
def test_pictures_are_read_as_torchvision_and_the_evaluation_have_them(
    size: tuple[int, int], mode: F.InterpolationMode, tmp_path: Path
) -> None:
    """Larger and smaller ones, whether the host resizes them or the device."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    to = Preprocessing(64, 56, (0.0, 0.0, 0.0), (1 / 255,) * 3, mode.value)
    read = prediction.read_image(tmp_path / "a.png", to)
    assert read.dtype == np.uint8
    want = F.center_crop(F.resize(PIL.Image.fromarray(pixels), 64, mode), 56)
    np.testing.assert_array_equal(read, np.asarray(want))
    np.testing.assert_array_equal(read, np.rint(compiled(lambda x: preprocess(x, to))(pixels[None])[0]))


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 8), (40, 32)])
def test_batches_of_one_shape(count: int, size: int, tmp_path: Path, capsys) -> None:
    """In the order of their names; unreadable ones are masked. No more rows than few pictures need."""
    for i in range(count):
        PIL.Image.new("RGB", (20 + i, 30), (i, i, i)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "bad.png").write_text("no picture")
    paths = sorted(tmp_path.iterdir())[: count + (count > 1)]
    run = run_of_means(1.0)
    run.config.data.batch_size = 32
    loader = prediction.loader_of(run, paths, DataParallel("shard_map"), None, BadFiles("skip"))
    levels, numbers = [], []
    for batch in loader.batches():
        assert batch["image"].shape == (size, 20, 20, 3)
        numbers += np.asarray(batch["example"])[np.asarray(batch["mask"])].tolist()
        levels += np.asarray(batch["image"])[np.asarray(batch["mask"]), 0, 0, 0].tolist()
    loader.close()
    assert [loader.reader.source.name(number) for number in numbers] == list(map(str, paths[:count]))
    assert levels == list(range(count))
    assert capsys.readouterr().err.count("left out") == (count > 1)


class Mean:
    """A network that tells the mean of each channel."""

    def apply(self, variables: dict[str, float], images: jax.Array, train: bool) -> jax.Array:
        return images.mean((1, 2)) * variables["scale"]


def run_of_means(scale: float, interpolation: str = "bilinear") -> Run:
    to = Preprocessing(24, 20, interpolation=interpolation)
    card = ModelCard("resnet18", 3, ("red", "green", "blue"), preprocessing=to)
    return Run(Path(), config_module.default(), card, Mean(), {"scale": scale}, 7)  # type: ignore[arg-type]


SIZES = {  # kind of set -> (height, width) of its pictures; of one size evaluation resizes them on the device
    "small": [(17, 30)],
    "large": [(60, 90)],
    "mixed": [(60, 90), (17, 30), (24, 24), (200, 25)],
}


def assert_as_evaluated(run: Run, root: Path, batch_size: int) -> None:
    """The probability of the likeliest class of each picture, to the last bit."""
    run.config.data.update({"batch_size": batch_size, "workers": 0})
    answers = evaluation.evaluate_run(run, evaluation.open_examples(run, f"folder:{root}")).answers
    found = list(prediction.predict(run, loose.find([root]), 1))
    assert [entry["classes"][0]["class"] for entry in found] == [run.card.names[i] for i in answers["predicted"]]
    np.testing.assert_array_equal([entry["classes"][0]["probability"] for entry in found], answers["probability"])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("kind", SIZES)
def test_the_results_are_the_evaluations(kind: str, interpolation: str, tmp_path: Path) -> None:
    for number in range(10):
        sizes = SIZES[kind]
        write(tmp_path / ("red", "green")[number // 5] / f"{number}.png", number, sizes[number % len(sizes)])
    assert_as_evaluated(run_of_means(5.0, interpolation), tmp_path, 8)


def test_the_results_of_a_trained_network_are_the_evaluations(workdir: Path, tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / ("cat", "dog")[number % 2] / f"{number}.jpg", number, SIZES["mixed"][number % 4])
    assert_as_evaluated(load_run(workdir), tmp_path, 16)


def test_probabilities_are_of_calibrated_logits(tmp_path: Path) -> None:
    """Divided by the card's temperature."""
    path, run = write(tmp_path / "a.png"), run_of_means(1.0)
    warm = dataclasses.replace(run, card=dataclasses.replace(run.card, temperature=2.5))
    plain, calibrated = (next(prediction.predict(one, [path], 3))["classes"] for one in (run, warm))
    odds = np.array([one["probability"] for one in plain]) ** (1 / 2.5)
    np.testing.assert_allclose([one["probability"] for one in calibrated], odds / odds.sum(), rtol=1e-6)


@pytest.mark.full
def test_worker_processes_and_threads_read_the_same(workdir: Path, tmp_path: Path, monkeypatch) -> None:
    paths = [write(tmp_path / f"{number}.jpg", number, SIZES["mixed"][number % 4]) for number in range(50)]
    paths.insert(20, tmp_path / "gone.jpg")
    run, bad = load_run(workdir), BadFiles("skip")
    found = list(prediction.predict(run, paths, 3))
    monkeypatch.setattr(prediction, "FEW", 0)
    assert list(prediction.predict(run, paths, 3, bad=bad)) == found
    assert list(bad.found) == [str(tmp_path / "gone.jpg")] and len(found) == 50


def test_pictures_of_many_sizes_take_one_compilation(tmp_path: Path) -> None:
    programs: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **rest: programs.append(event) if event.endswith("jaxpr_to_mlir_module_duration") else None
    )
    for i in range(40):
        colour = tuple(np.roll((200, 100, 50), i))
        PIL.Image.new("RGB", (5 + 7 * i, 250 - 5 * i), colour).save(tmp_path / f"{i:02}.png")
    found = list(prediction.predict(run_of_means(1.0), sorted(tmp_path.iterdir()), 2))
    assert [entry["classes"][0]["class"] for entry in found] == [("red", "green", "blue")[i % 3] for i in range(40)]
    assert {len(entry["classes"]) for entry in found} == {2}
    assert len(programs) == 1


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
    assert [str(Path(path).relative_to(tmp_path)) for path in found] == names
    assert "links back" in capfd.readouterr().err


def test_names_patterns_and_lists(tmp_path: Path) -> None:
    """A name that exists is no pattern, and a list's names are none; ** does not follow a link back."""
    for name in ("a/1.png", "a/[1].png", "a/b/2.png", "a/b/c.txt", "a/b/d/3.jpg", "a/b/d/.4.jpg", "-5.png", "6\n.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a/b/loop").symlink_to(tmp_path / "a")

    def found(*names: str, listed: tuple[str, ...] = ()) -> list[str]:
        paths = loose.find([f"{tmp_path}/{name}" for name in names], [f"{tmp_path}/{name}" for name in listed])
        return [str(Path(path).relative_to(tmp_path)) for path in paths]

    assert found("a/[1].png") == ["a/[1].png"]
    assert found("a/[12].png", "a/b/*.*", "a/*/d") == ["a/1.png", "a/b/2.png", "a/b/c.txt", "a/b/d/3.jpg"]
    assert found("a/**/*.png") == ["a/1.png", "a/[1].png", "a/b/2.png"]
    assert found("a/**") == ["a/1.png", "a/[1].png", "a/b/2.png", "a/b/d/3.jpg"]
    assert found("**/d/*.jpg") == ["a/b/d/3.jpg"]
    assert found(listed=("a/[1].png", "a/*.png", "gone.png", "a/b/d")) == ["a/[1].png", "a/*.png", "gone.png",
                                                                           "a/b/d/3.jpg"]  # fmt: skip
    for pattern in ("a/*.gif", "a/**/x.png", "none/**/x.png"):
        with pytest.raises(cli.UserError, match=re.escape(f"nothing matches {tmp_path}/{pattern}; name images")):
            found(pattern)
    lists = {b"a.png\n\n-b.png\r\nc \xff.png": ["a.png", "-b.png", "c \udcff.png"],
             b"\xef\xbb\xbf\xc3\xa9\n": ["\xe9"], b"6\n.png\0a\0": ["6\n.png", "a"], b"": []}  # fmt: skip
    assert [loose.names_in(content) for content in lists] == list(lists.values())


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
    assert main(monkeypatch, "--workdir", workdir, tmp_path) == 1
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


def test_lists_tables_lines_and_the_exit_status(workdir: Path, tmp_path: Path, monkeypatch) -> None:
    """One program of all names, whatever is in them; what is missing is passed over."""
    names = ["a.png", "-b,c.png", 'd"e.png', "f\ng.png", "h \udcff.png"]
    for number, name in enumerate(names):
        write(tmp_path / name, number)
    monkeypatch.chdir(tmp_path)
    content = b"".join(os.fsencode(name) + b"\0" for name in [*names[:2], "gone.png", *names[2:]])

    def predicted(arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return hear_command(f"predict --workdir {workdir} --topk 2 {arguments}", tmp_path)

    status, out, said = predicted("- --out - --json @/out.json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (status, [line["file"] for line in lines]) == (1, names)
    assert "warning: left out gone.png: no such file\n" in said
    assert f"-b,c.png: {lines[1]['classes'][0]['class']} " in said
    assert json.loads((tmp_path / "out.json").read_text()) == {"step": 4, "images": lines}

    status, out, _ = predicted("--list - --out @/out.csv")
    assert (status, out.count("\n")) == (1, 5)
    with open("out.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    assert [row[0] for row in rows] == [*names[:4], "h \\udcff.png"]
    wanted = [[str(value) for one in line["classes"] for value in one.values()] for line in lines]
    assert [row[1:] for row in rows] == wanted

    assert predicted("a.png d*.png --out @/out.jsonl --batch-size 1")[0] == 0
    assert [json.loads(line)["file"] for line in Path("out.jsonl").read_text().splitlines()] == ["a.png", 'd"e.png']
    before = sorted(tmp_path.iterdir())
    for arguments, message in (
        ("--out @/x.txt a.png", f"--out {tmp_path}/x.txt is no name for predictions; let it end in .csv or .jsonl, or"),
        ("--out @/none/x.csv a.png", f"{tmp_path}/none/x.csv can't be written: No such file or directory; name"),
        ("--list @/none a.png", f"{tmp_path}/none can't be read: No such file or directory; name a file of names"),
        ("--batch-size 0 a.png", "--batch-size is 0; it must be 1 or more"),
        ("'*.gif' --out @/x.csv", "nothing matches *.gif; name images or folders of images"),
        ("gone.png --out @/x.csv", "gone.png can't be read: No such file or directory; name images"),
        ("--json - --out - a.png", "--out and --json are both stdout; name a file for one of them"),
    ):
        status, out, said = predicted(arguments)
        assert (status, out, said.count("\n")) == (2, "", 1), said
        assert said.startswith(f"error: {message}")
    assert sorted(tmp_path.iterdir()) == before
    content = b"gone.png\n"
    status, out, said = predicted("--list - --out @/x.csv --json -")
    assert (status, out) == (2, "") and "none of 1 images can be read" in said
    assert sorted(tmp_path.iterdir()) == before
