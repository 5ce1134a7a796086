"""`jaxsft.evaluate`: all that it says and writes of a run, what it makes of its views, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from torchvision import transforms

import jaxsft
from jaxsft.data.augment import normalise, preprocess
from jaxsft.data.base import Arrays, Options
from jaxsft.data.embedded import open_sample
from jaxsft.data.sources import SOURCES
from jaxsft.models.weights import ModelCard
from jaxsft.run import saved, temperature
from tests import small
from tests.commands import assert_refused, hear_command

OVERRIDES = (
    "--config.train.epochs=1", "--config.data.resize_size=40", "--config.data.on_error=skip",
    "--config.data.workers=0", "--config.data.train_split=train[:64]",
)  # fmt: skip
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "run"
    small.train_here(small.config(*OVERRIDES), path)
    return path


@pytest.fixture
def own(workdir: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(workdir, tmp_path / "run"))


def pictures(folder: Path, count: int = 14) -> Path:
    """The sample's first test images, of several sizes, in folders of their classes; one can't be read."""
    source = open_sample("", f"test[:{count}]", Options())
    for number, (image, label) in enumerate(zip(source.images, source.labels, strict=True)):
        path = folder / source.class_names[label] / f'{number:02}, "a"\né\udcff.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).resize((40 + 3 * number, 70 - 2 * number)).save(path)
    (folder / "cat" / "broken.png").write_text("no picture")
    return folder


def test_says_all_of_it(workdir: Path, tmp_path: Path) -> None:
    """The command, its JSON, and the result in Python say one thing."""
    command = f"evaluate --workdir {workdir} --json @/e.json --bootstrap 50 --top-losses 2"
    status, said, heard = hear_command(command, tmp_path)
    assert (status, heard) == (0, "")
    record, run = json.loads((tmp_path / "e.json").read_text()), jaxsft.load(workdir)
    result = run.evaluate()
    assert isinstance(result, jaxsft.interpret.metrics.Evaluation)
    before = ("step", "precision", "loss", "accuracy", "top5", "count", "per_class", "confusion")  # scripts read these
    assert [key for key in record if key in before] == list(before)
    assert {key: record[key] for key in result.scalars()} == result.scalars()
    assert record["confusion"] == result.confusion.tolist() and record["precision"].startswith("float32")
    table = result.per_class_table()
    assert [row["class"] for row in record["classes"]] == [*record["per_class"]] == list(NAMES)
    assert [row["support"] for row in record["classes"]] == [row.support for row in table]
    assert record["averages"]["macro"] == pytest.approx(result.average("macro"))
    pairs = [(NAMES.index(pair["label"]), NAMES.index(pair["predicted"]), pair["count"]) for pair in record["confused"]]
    assert pairs == result.confused(100)
    assert record["calibration"]["ece"] == result.calibration().ece and record["calibration"]["nll"] == result.nll
    assert result.nll == pytest.approx(result.loss)
    assert (record["intervals"].pop("level"), record["intervals"].pop("resamples")) == (0.95, 50)
    assert {name: tuple(edges) for name, edges in record["intervals"].items()} == result.interval(50)
    assert (record["temperature"], record["evaluated_on"], record["tta"], record["left_out"]) == (
        1.0,
        "test[:40]",
        "",
        {},
    )
    assert record["top_losses"][0]["loss"] == pytest.approx(float(result.answers["loss"].max()))
    lines = said.splitlines()
    assert lines[0] == f"{workdir} at step 4: {result.summary()} (test[:40]); {record['precision']}"
    assert lines[1].startswith("95% intervals of 50 resamples: accuracy ")
    assert [line.split()[0] for line in lines[2:15]] == ["class", *NAMES, "macro", "weighted"]
    assert lines[15].startswith("most often taken: ")
    assert lines[16] == (
        f"calibration: ECE {result.calibration().ece:.4f}, MCE {result.calibration().mce:.4f}, NLL {result.nll:.4f},"
        f" Brier {result.brier:.4f} at temperature 1"
    )
    assert lines[17] == "largest losses:" and len(lines) == 20
    page = result._repr_html_()
    assert page.startswith("<pre>accuracy") and "weighted" in page


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_row_for_every_example(suffix: str, workdir: Path, tmp_path: Path) -> None:
    """With names that no program should have to bear, as pandas reads them; what can't be read is told."""
    folder, run = pictures(tmp_path / "images"), jaxsft.load(workdir)
    to = tmp_path / f"p.{suffix}"
    to.write_text("old")
    command = f"evaluate --workdir {workdir} --data folder:{folder} --predictions {to} --bootstrap 0 --json @/e.json"
    status, said, heard = hear_command(command, tmp_path)
    assert status == 0, heard
    assert "1 images can't be read and are left out" in said and f"{to}: 14 rows" in said
    record = json.loads((tmp_path / "e.json").read_text())
    assert [Path(file).name for file in record["left_out"]] == ["broken.png"]
    table = pd.read_csv(to) if suffix == "csv" else pd.read_parquet(to)
    first = ["file", "label", "predicted", "correct", "probability", "rank", "loss"]
    best = [f"{kind}_{place}" for place in range(1, 6) for kind in ("class", "probability")]
    assert [*table.columns] == [*first, *best, *(f"p_{name}" for name in NAMES)]
    files = sorted(str(path) for path in folder.rglob("*, *.png"))
    assert sorted(table["file"]) == sorted(file.replace("\udcff", "\\udcff") for file in files)
    assert [Path(file).parent.name for file in table["file"]] == table["label"].tolist()
    assert table["correct"].tolist() == (table["label"] == table["predicted"]).tolist() == (table["rank"] == 0).tolist()
    assert table["correct"].mean() == pytest.approx(record["accuracy"])
    assert table["loss"].mean() == pytest.approx(record["loss"], rel=1e-6)
    by_class = table[[f"p_{name}" for name in NAMES]].to_numpy()
    np.testing.assert_allclose(by_class.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.sort(by_class)[:, ::-1][:, :5], table[best[1::2]])
    np.testing.assert_array_equal([NAMES[k] for k in by_class.argmax(1)], table["predicted"])
    assert (table["class_1"] == table["predicted"]).all() and (table["probability_1"] == table["probability"]).all()
    label = np.array([NAMES.index(name) for name in table["label"]])
    np.testing.assert_array_equal((by_class > by_class[np.arange(14), label][:, None]).sum(1), table["rank"])
    # The same files one by one, as predict reads them:
    by_file = dict(zip(table["file"], table["probability"], strict=True))
    for entry in run.predict(list(folder.rglob("*, *.png")), topk=1):
        assert by_file[entry["file"].replace("\udcff", "\\udcff")] == pytest.approx(
            entry["classes"][0]["probability"], abs=2e-3
        )  # those that must be made larger are not rounded to 8 bits there


def test_crops_of_streamed_pictures(workdir: Path, tmp_path: Path) -> None:
    """torchvision's Resize and CenterCrop to the larger square, and its TenCrop, picture by picture."""
    folder, run = pictures(tmp_path / "images"), jaxsft.load(workdir)
    run.evaluate(f"folder:{folder}", tta="flip+crops", predictions=tmp_path / "p.csv")
    table = pd.read_csv(tmp_path / "p.csv")
    assert run.card.preprocessing.resize_size == 40 and run.card.preprocessing.crop_size == 32
    crop = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(40), transforms.TenCrop(32)])
    files = {str(path).replace("\udcff", "\\udcff"): path for path in folder.rglob("*, *.png")}
    assert len(table) == 14
    apply = jax.jit(partial(run.model.apply, run.variables, train=False))
    for _, row in table.iterrows():
        views = np.stack([np.asarray(view, np.float32) for view in crop(PIL.Image.open(files[row["file"]]))])
        expected = np.asarray(jax.nn.softmax(apply(normalise(views, run.card.preprocessing)))).mean(0)
        np.testing.assert_allclose(row[[f"p_{name}" for name in NAMES]].astype(float), expected, atol=1e-5)


@pytest.mark.full
def test_views_of_a_set_in_memory(workdir: Path, tmp_path: Path) -> None:
    run = jaxsft.load(workdir)
    alone, flipped = run.evaluate(), run.evaluate(tta="flip")
    source = open_sample("", "test[:40]", Options())
    pixels = preprocess(source.images, run.card.preprocessing)
    apply = jax.jit(partial(run.model.apply, run.variables, train=False))
    expected = np.mean([jax.nn.softmax(apply(x)) for x in (pixels, pixels[:, :, ::-1])], 0)
    np.testing.assert_allclose(flipped.answers["probability"], expected.max(1), rtol=1e-5)
    np.testing.assert_array_equal(flipped.answers["predicted"], expected.argmax(1))
    assert flipped.loss != alone.loss
    _, said, _ = hear_command(f"evaluate --workdir {workdir} --tta flip --bootstrap 0", tmp_path)
    assert said.splitlines()[0].endswith("(test[:40]), 2 views an image; float32 (auto), products in full")


def test_a_temperature_is_fitted_written_and_used(own: Path, tmp_path: Path) -> None:
    (own / "model.json").write_text(json.dumps({k: v for k, v in json.loads((own / "model.json").read_text()).items()
                                                if k != "temperature"}))  # fmt: skip  # as older versions wrote it
    run = jaxsft.load(own)
    assert run.card.temperature == 1
    status, said, heard = hear_command(
        f"evaluate --workdir {own} --fit-temperature test[100:400] --json @/e.json --bootstrap 0", tmp_path
    )
    assert (status, heard) == (0, "")
    record, card = json.loads((tmp_path / "e.json").read_text()), ModelCard.load(own)
    assert card == dataclasses.replace(run.card, temperature=record["temperature"]) and card.temperature != 1
    fit, after = record["temperature_fit"], jaxsft.load(own).evaluate()
    assert (fit["split"], fit["images"]) == ("test[100:400]", 300)
    before = run.evaluate()  # the card as it was loaded
    assert fit["before"]["nll"] == pytest.approx(before.nll, rel=1e-5)
    assert fit["before"]["ece"] == pytest.approx(before.calibration().ece, rel=1e-4)
    assert fit["after"] == {"temperature": card.temperature, "nll": after.nll, "ece": after.calibration().ece}
    assert (before.accuracy, before.loss) == (after.accuracy, after.loss) and before.nll != after.nll
    assert after.answers["probability"].max() != pytest.approx(before.answers["probability"].max(), rel=1e-3)
    assert f"temperature 1 -> {card.temperature:.4g}, fitted on 300 images (test[100:400]): NLL " in said
    assert list(own.glob(".*")) == [] and not (own / "model.json.partial").exists()
    again = jaxsft.load(own).fit_temperature("test[100:400]")  # from logits as they are, whatever was fitted before
    assert again.card.temperature == pytest.approx(card.temperature, rel=1e-9)
    assert isinstance(again, jaxsft.Run) and again.evaluate().nll == pytest.approx(after.nll)


def test_a_temperature_that_can_not_be_written_is_not_fitted(own: Path, tmp_path: Path) -> None:
    (own / "model.json").unlink()
    (own / "model.json").mkdir()  # the card is in the checkpoint, too
    expected = "@/run/model.json can't be written: Is a directory; name another file"
    command = "evaluate --workdir @/run --fit-temperature test[100:200] --predictions @/p.csv"
    assert_refused(command, expected, tmp_path)
    assert not (tmp_path / "p.csv").exists()


def test_a_run_that_goes_on_has_other_weights_and_no_temperature(own: Path) -> None:
    """A finished one keeps it."""
    run = saved.load_run(own)
    temperature.write(dataclasses.replace(run, card=dataclasses.replace(run.card, temperature=2.0)))
    small.train_here(small.config(*OVERRIDES), own)
    assert saved.load_run(own).card.temperature == 2.0
    lines = (own / "metrics.jsonl").read_text().splitlines()
    (own / "metrics.jsonl").write_text("".join(line + "\n" for line in lines if '"final"' not in line))
    shutil.rmtree(own / "checkpoints" / "4")
    small.train_here(small.config(*OVERRIDES), own)
    assert saved.load_run(own).step == 4 and saved.load_run(own).card.temperature == 1.0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("val", "test", False), ("val", "Validation", True), ("test[:50%]", "test[50%:]", False),
        ("test[:40]", "test[40:80]", False), ("test[:41]", "test[40:80]", True), ("test[:40]", "test[50%:]", True),
        ("test[-40:]", "test[:5]", True), ("train+val", "val[:3]", True), ("all", "train", True),
        ("train", "test", False), ("test[:1_000]", "test[1000:]", False),
    ],
)  # fmt: skip
def test_splits_that_share_images(first: str, second: str, expected: bool) -> None:
    assert temperature.share_images(first, second) == temperature.share_images(second, first) == expected


REFUSED = (
    ("--fit-temperature test[:50]", "a temperature fitted on 'test[:50]' would be judged by images of 'test[:40]'..."),
    ("--fit-temperature train --tta flip", "--fit-temperature fits the network by itself, as predict uses it..."),
    ("--fit-temperature none", "sample has no split 'none': it has train, test; name one of them, with slices"),
    ("--bootstrap -1", "--bootstrap is -1; it must be 0 or more"),
    ("--top-losses -1", "--top-losses is -1; it must be 0 or more"),
    ("--tta mirror", "--tta is 'mirror'; it must be flip, crops or flip+crops"),
    ("--predictions @/p.txt", "@/p.txt is no name of a table; let it end in .csv or .parquet"),
    ("--predictions @/none/p.csv", "@/none/p.csv can't be written: No such file or directory; name another file"),
    ("--checkpoint 3333", "@/run has no intact checkpoint of step 3333; name another --checkpoint"),
    ("--data folder:@/images", "folder:@/images has the class 'owl', which the model lacks; leave it out or..."),
    ("--data csv:@/images/a.csv", "csv:@/images/a.csv has the class 'owl', which the model lacks; leave it out or..."),
    ("--data negative:", "negative:: image 1 has the label -1, which is none of its 10 classes (1 of 3 have such..."),
    ("--data beyond:", "beyond:: image 1 has the label 10, which is none of its 10 classes (1 of 3 have such..."),
    ("--data more:", "more: has the class 'class 11', which the model lacks; leave it out or train on it too"),
)  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_what_is_refused(arguments: str, expected: str, own: Path, tmp_path: Path, monkeypatch) -> None:
    """In one line, before the work; a label outside the head is an error however it comes."""
    (tmp_path / "images" / "owl").mkdir(parents=True)
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "images" / "owl" / "a.png")
    (tmp_path / "images" / "a.csv").write_text("path,label\nowl/a.png,owl\n")
    for kind, label in (("negative", -1), ("beyond", 10), ("more", 11)):
        names = NAMES if kind != "more" else tuple(f"class {k}" if k > 9 else NAMES[k] for k in range(12))
        made = Arrays(np.zeros((3, 8, 8, 3), np.uint8), np.array([0, label, 1], np.int32), names)
        monkeypatch.setitem(SOURCES, kind, lambda name, split, options, made=made: made)
    card = (own / "model.json").read_bytes()
    assert_refused(f"evaluate --workdir @/run --json @/e.json {arguments}", expected, tmp_path)
    assert not (tmp_path / "e.json").exists() and (own / "model.json").read_bytes() == card


def test_a_label_beyond_a_head_without_names(own: Path, tmp_path: Path, monkeypatch) -> None:
    card = json.loads((own / "model.json").read_text())
    (own / "model.json").write_text(json.dumps({**card, "class_names": None}))
    made = Arrays(np.zeros((3, 8, 8, 3), np.uint8), np.array([0, 10, 1], np.int32), tuple(map(str, range(11))))
    monkeypatch.setitem(SOURCES, "beyond", lambda name, split, options: made)
    expected = "beyond: has the label 10, the model 10 outputs; name the data that it was trained for"
    assert_refused(f"evaluate --workdir {own} --data beyond:", expected, tmp_path)


def test_pyarrow_that_is_missing_is_one_line(workdir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    expected = "pyarrow is not installed; pip install 'jaxsft[parquet]'"
    assert_refused(f"evaluate --workdir {workdir} --predictions @/p.parquet", expected, tmp_path)


def test_none_readable_is_an_error(workdir: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "images" / "cat" / f"{name}.png").write_text("no picture")
    command = f"evaluate --workdir {workdir} --data folder:@/images --predictions @/p.csv"
    status, _, said = hear_command(command, tmp_path)
    assert status == 2 and "Traceback" not in said and said.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "p.csv").exists() and [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.full
@pytest.mark.usefixtures("google")
def test_a_run_in_a_bucket(workdir: Path, place, tmp_path: Path) -> None:
    from jaxsft import storage

    storage.upload(workdir, place / "run")
    table = f"{place}/p.csv"
    command = f"evaluate --workdir {place}/run --fit-temperature test[100:200] --predictions {table} --bootstrap 0"
    status, said, heard = hear_command(command, tmp_path)
    assert status == 0, heard
    assert ModelCard.load(place / "run").temperature == saved.load_run(place / "run").card.temperature != 1
    assert len((place / "p.csv").read_text().splitlines()) == 41
    assert f"{place}/run/model.json has it" in said
