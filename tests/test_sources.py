"""Sources by name: splits and classes, the registry, and the same CIFAR-10 from TFDS and from a folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.data import decode, sources
from jaxsft.data.base import Arrays, Options
from jaxsft.data.sources import open_source, open_splits, with_classes
from jaxsft.data.splits import resolved, slices
from tests import small
from tests.commands import hear_command, run_command

SIZES = {"train": 100, "validation": 20, "test": 50}
SLICES = [
    ("train", [("train", 0, 100)]),
    ("train[:10]", [("train", 0, 10)]),
    ("train[90%:]", [("train", 90, 100)]),
    ("train[:10]+test[40:]", [("train", 0, 10), ("test", 40, 50)]),
    ("", [("validation", 0, 20)]),
]


@pytest.mark.parametrize(("split", "want"), SLICES)
def test_slices(split: str, want: list):
    assert slices(split, SIZES, "x") == want


SPELT = [
    ("Train[:10]", "train[:10]", [("train", 0, 10)]),
    ("val + testing[-10:]", "validation+test[-10:]", [("validation", 0, 20), ("test", 40, 50)]),
    ("all", "train+validation+test", [("train", 0, 100), ("validation", 0, 20), ("test", 0, 50)]),
    ("test[-5%:]", "test[-5%:]", [("test", 48, 50)]),
    ("train[33.3%:50]", "train[33.3%:50]", [("train", 33, 50)]),
    ("", "validation", [("validation", 0, 20)]),
]


@pytest.mark.parametrize(("split", "called", "want"), SPELT)
def test_splits_in_other_spellings(split: str, called: str, want: list):
    assert resolved(split, SIZES, "x") == called
    assert slices(split, SIZES, "x") == slices(called, SIZES, "x") == want


@pytest.mark.parametrize("name", ["all", "hold out", "fold/1", "été"])
def test_any_name_of_a_split(name: str):
    assert slices(f"{name}[5:]", {"train": 3, name: 9}, "x") == [(name, 5, 9)]
    assert slices(f"train+{name}", {"train": 3, name: 9}, "x") == [("train", 0, 3), (name, 0, 9)]


@pytest.mark.parametrize("end", [0, 1, 7, 33, 50, 66.6, 99, 100])
@pytest.mark.parametrize("size", [1, 3, 10, 101])
def test_shares_are_rounded_as_tfds_does(end: float, size: int):
    import tensorflow_datasets as tfds

    info = tfds.core.SplitInfo(name="train", shard_lengths=[size], num_bytes=0, filename_template=None)
    for split in (f"train[:{end}%]", f"train[-{end}%:]", f"train[{end}%:]"):
        (want,) = tfds.core.ReadInstruction.from_spec(split).to_absolute({"train": info})
        (got,) = slices(split, {"train": size}, "x")
        if "-" not in split or round(end * size / 100):  # TFDS counts what is rounded to -0 from the start
            assert got == ("train", want.from_ or 0, size if want.to is None else want.to)


@pytest.mark.parametrize("split", ["all[:5]", "train[60:50]", "train[1.5:]", "train[:_]", "train[:2%%]", "vali",
                                   "trian", "train[:1", "train[:200%]", "train[::2]"])  # fmt: skip
def test_wrong_slices(split: str):
    with pytest.raises(UserError, match="x has no split"):
        slices(split, SIZES, "x")
    with pytest.raises(UserError, match="no split to evaluate on"):
        slices("", {"train": 5}, "x")


def arrays(labels: list[int], names: str, value: int = 0) -> Arrays:
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] + np.full((1, 8, 8, 3), value, np.uint8)
    return Arrays(images, np.array(labels, np.int32), tuple(names))


def test_classes_are_numbered_as_in_training():
    source = with_classes(arrays([0, 1, 1], "ca"), "abc", "it", "the model")
    assert source.labels.tolist() == [2, 0, 0]
    assert source.class_names == ("a", "b", "c")
    assert with_classes(arrays([0], "ax"), "abc", "it", "the model").labels.tolist() == [0]  # x has no images
    with pytest.raises(UserError, match="it has the class 'x', which the model lacks"):
        with_classes(arrays([0, 1], "ax"), "abc", "it", "the model")


def small_config(**data):
    config = config_module.default()
    config.data.update(data)
    return config


def test_a_registered_source(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))
    opened = []

    def open_mine(name: str, split: str, options: Options) -> Arrays:
        opened.append((name, split))
        return arrays([0, 1] * 10, "ab") if split == "train" else arrays([0, 1, 1], "ab", value=18)

    sources.register("mine", open_mine)
    config = small_config(source="mine:x", check_overlap=True, per_class=4)
    train, evaluated = open_splits(config)
    assert opened == [("x", "train"), ("x", "")]
    assert np.bincount(train.labels).tolist() == [4, 4]
    assert len(evaluated) == 3
    assert "2 of 3 images to evaluate on are also trained on" in capfd.readouterr().err  # 18 and 19 of 0..19


MINE = """
import numpy as np
from jaxsft.data.base import Arrays
from jaxsft.data.sources import register
from tests import small

def open_mine(name, split, options):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3)).astype(np.uint8)
    return Arrays(images, np.arange(32, dtype=np.int32) % 3, ("ash", "birch", "cedar"))

def get_config(variant=""):
    register("mine", open_mine)
    return small.config("--config.data.source=mine:x", "--config.data.train_split=train", "--config.train.steps=1",
                        "--config.optim.warmup_epochs=0")
"""


def test_a_source_of_a_config_file_is_trained_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    shipped = dict(sources.SOURCES)

    def start(command: str) -> tuple[int, str, str]:
        """As in a new process, which knows the sources that come with the package."""
        monkeypatch.setattr(sources, "SOURCES", dict(shipped))
        return hear_command(f"{command} --workdir @/run", tmp_path)

    status, _, said = start("train --config=@/mine.py")
    assert status == 0, said
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert list(last["per_class"]) == ["ash", "birch", "cedar"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Confusions" in report and report.count("<img ") > 3
    status, _, said = start("evaluate --config=tests/small.py")
    assert status == 2
    assert "unknown data source 'mine:x'" in said
    status, printed, said = start("evaluate --config=@/mine.py")
    assert f"accuracy {last['accuracy']:.4f}" in printed, said


MADE = {
    "as it is": ([0, 1], np.int32, "", None),
    "named": ([0, 1], np.uint8, "train[:2]", None),
    "too large": ([0, 2], np.int32, "", "mine:x: image 1 has the label 2, which is none of its 2 classes"),
    "none": ([0, -1], np.int64, "", "image 1 has the label -1, which is none of its 2 classes"),
    "fractions": ([0, 1], np.float32, "", "the labels of mine:x are float32; they must be int32"),
    "nothing": ([], np.int32, "", "split 'val' of mine:x is empty"),
}


@pytest.mark.parametrize("case", MADE)
def test_what_a_config_file_opens_is_checked(case: str, monkeypatch: pytest.MonkeyPatch):
    labels, dtype, split, message = MADE[case]
    made = dataclasses.replace(arrays([0] * len(labels), "ab"), labels=np.array(labels, dtype), split=split)
    monkeypatch.setattr(sources, "SOURCES", {"mine": lambda *_: made})
    if message is None:
        assert open_source("mine:x", "val").split == (split or "val")
    else:
        with pytest.raises(UserError, match=message):
            open_source("mine:x", "val")


def test_a_broken_image_overlaps_with_none():
    class Broken(Arrays):
        def __getitem__(self, index: int) -> np.ndarray:
            if index == 1:
                raise decode.Unreadable("broken")
            return super().__getitem__(index)

    source = Broken(**vars(arrays([0, 0, 1], "ab")))
    assert sources.overlap(source, source) == [(0, 0), (2, 2)]


def test_where_all_is_left_out_the_reason_is_said(tmp_path: Path):
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/1.png").write_text("no picture")
    (tmp_path / "val/a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"split 'train' of .* has no image that can be read, such as .*1\.png: "):
        open_source(f"folder:{tmp_path}", "train", Options(on_error="skip"))
    with pytest.raises(UserError, match="split 'val' of folder:.* is empty; name another slice"):
        open_source(f"folder:{tmp_path}", "", Options(on_error="skip"))


def test_the_folder_of_tfds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert Options(data_dir="~/tfds").data_dir == "/home/me/tfds"
    assert dataclasses.replace(Options(), data_dir="~").data_dir == "/home/me"
    with pytest.raises(UserError, match="ftp://host can't be used"):
        Options(data_dir="ftp://host")


def test_the_sample_says_its_split():
    assert open_source("sample", "").split == "test"
    assert open_source("sample", "Train[:3]").split == "train[:3]"


@pytest.mark.parametrize(
    ("spec", "message"),
    [("tdfs:cifar10", "unknown data source 'tdfs:cifar10'; did you mean 'tfds'"), ("folder:", "is no folder")],
)
def test_wrong_names(spec: str, message: str):
    with pytest.raises(UserError, match=message):
        open_source(spec, "train")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.eval_fraction", 1.0),
        ("data.fraction", 0.0),
        ("data.per_class", 0),
        ("data.on_error", "ignore"),
        ("data.workers", -1),
        ("data.last_batch", "pad"),
        ("data.sampling", "even"),
        ("data.crop_scale", (0.5, 0.1)),
        ("data.crop_ratio", (0.5,)),
        ("data.jitter", (0.1, 0.1, 0.1, 0.6)),
        ("data.rand_augment", (0, 9)),
        ("data.erasing", 1.5),
        ("data.augment", ("flip", "random_resized_crop")),
        ("data.augment", ("random_erasing", "flip")),
        ("data.augment", ("filp",)),
        ("train.mixup", -1.0),
        ("train.cutmix", -1.0),
    ],
)
def test_settings_that_cannot_be_meant(key: str, value):
    config = config_module.default()
    parent, leaf = key.split(".")
    config[parent][leaf] = value
    with pytest.raises(UserError, match=f"config.{key} "):
        config_module.check(config)


@pytest.fixture(scope="module")
def cifar(realdata: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Options, Path]:
    """100 + 70 images of the real CIFAR-10 as TFDS has them, and the same as a folder of PNGs and as a CSV file."""
    options, root = Options(data_dir=str(realdata / "tfds")), tmp_path_factory.mktemp("cifar")
    lines = []
    for split, part, count in (("train", "train", 100), ("val", "test", 70)):
        source = open_source("tfds:cifar10", f"{part}[:{count}]", options)
        for i in range(count):
            name = f"{split}/{source.class_names[source.labels[i]]}/{i:05d}.png"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(source.images[i]).save(root / name)
            lines.append(f"{name},{source.class_names[source.labels[i]]},{part}")
    (root / "images.csv").write_text("\n".join(lines))
    return options, root


def test_tfds_and_folder_hold_the_same_images(cifar: tuple[Options, Path]):
    options, root = cifar
    for split, part, count in (("train", "train", 100), ("val", "test", 70)):
        tfds = open_source("tfds:cifar10", f"{part}[:{count}]", options)
        files = open_source(f"folder:{root}", split)
        assert files.class_names == tfds.class_names
        assert files.size == (32, 32)
        for i in range(count):
            number = int(Path(files.name(i)).stem)
            assert files.labels[i] == tfds.labels[number]
            np.testing.assert_array_equal(np.asarray(files[i]), tfds.images[number])


def test_streamed_tfds_is_the_array(cifar: tuple[Options, Path]):
    options, _ = cifar
    streamed = open_source("tfds:cifar10", "train[:5]+test[5:9]", Options(options.data_dir, resident_mb=0))
    held = open_source("tfds:cifar10", "train[:5]+test[5:9]", options)
    np.testing.assert_array_equal(streamed.labels, held.labels)
    assert streamed.size == held.size
    assert streamed.split == held.split == "train[:5]+test[5:9]"
    for i in range(9):
        np.testing.assert_array_equal(np.asarray(streamed[i]), held.images[i])
    part = streamed.select(np.array([8, 0]))
    np.testing.assert_array_equal(np.asarray(part[0]), held.images[8])
    assert part.name(0).startswith("example 8 of split test")


def test_tfds_and_files_train_and_evaluate_alike(cifar: tuple[Options, Path], tmp_path: Path):
    """The same images in the same order, TFDS's on the device or streamed from files, are the same run to the last bit.

    A folder has them in another order, and evaluates the same model to the same numbers.
    """
    options, root = cifar
    common = ("--config.train.epochs=1", "--config.data.workers=1")
    data = {
        "tfds": [f"--config.data.data_dir={options.data_dir}", "--config.data.source=tfds:cifar10",
                 "--config.data.train_split=train[:100]", "--config.data.eval_split=test[:70]"],
        "stream": [f"--config.data.source=csv:{root / 'images.csv'}", "--config.data.resident_mb=0",
                   "--config.data.train_split=train", "--config.data.eval_split=test"],
    }  # fmt: skip
    last = {}
    for name, arguments in data.items():
        workdir = tmp_path / name
        small.run_here(workdir, *common, *arguments)
        last[name] = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    keys = ("loss", "accuracy", "top5", "count")
    assert len({tuple(record[key] for key in keys) for record in last.values()}) == 1
    report = tmp_path / "folder.json"
    status, said = run_command(f"evaluate --workdir @/tfds --data folder:{root} --json {report}", tmp_path)
    assert status == 0, said
    record = json.loads(report.read_text())
    assert (record["accuracy"], record["top5"], record["count"]) == tuple(last["tfds"][k] for k in keys[1:])
    assert record["loss"] == pytest.approx(last["tfds"]["loss"], rel=1e-6)  # float32 sums in another order
