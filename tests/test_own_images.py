"""A run on images in folders, as a lab has them: what changes between two starts is noticed, what is odd is said."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from jaxsft.cli import Stop, UserError
from jaxsft.data.base import Arrays
from jaxsft.data.fingerprint import difference, fingerprint
from jaxsft.data.sources import SOURCES, open_splits, with_classes
from jaxsft.flags import parse_flags
from jaxsft.interpret.report import single
from jaxsft.models.weights import ModelCard
from jaxsft.run import checkpoint, prepare, saved, training, workdir
from jaxsft.run.log import records
from tests import small

CLASSES = ("ant", "bee", "$_$")


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("own") / "images"
    for k, label in enumerate(CLASSES):
        for i in range(8):
            picture(root / ("train" if i < 6 else "val") / label / f"{i}.png", 10 * k + i)
    return root


def run_here(path: Path, images: Path, *overrides: str, report: bool = False) -> None:
    """A run of six steps of four pictures."""
    config, _, _ = parse_flags(
        [
            "--config=configs/folder.py", f"--config.model.arch={small.ARCH}", "--config.model.weights=",
            "--config.train.method=full",
            "--config.data.image_size=32",
            "--config.data.batch_size=4", "--config.train.steps=6", "--config.optim.warmup_epochs=0",
            "--config.data.workers=0", "--config.checkpoint.every_steps=2", "--config.checkpoint.keep=9",
            f"--config.data.source=folder:{images}", *overrides,
        ], "", {},
    )  # fmt: skip
    if report:
        workdir.check(path, config)
        training.train(config, path)
    else:
        small.train_here(config, path)


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    run_here(path, images, report=True)
    return path


@pytest.fixture
def stopped(finished: Path, images: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run, stopped after two steps, and one of its images."""
    path, own = shutil.copytree(finished, tmp_path / "run"), shutil.copytree(images, tmp_path / "images")
    for step in checkpoint.steps(path)[1:]:
        shutil.rmtree(path / "checkpoints" / str(step))
    log = path / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= 2))
    config = json.loads((path / "config.json").read_text())
    config["data"]["source"] = f"folder:{own}"
    (path / "config.json").write_text(json.dumps(config))
    return path, own


def rename(root: Path) -> None:
    for part in ("train", "val"):
        (root / part / "bee").rename(root / part / "aardvark")


def add_class(root: Path) -> None:
    picture(root / "train" / "cat" / "0.png", 99)


CHANGES = {
    "a class has another name": (rename, r"other classes: no longer 'bee', newly 'aardvark'"),
    "a class more": (add_class, r"holds a model of 3 classes, the data have 4: newly 'cat'; give another --workdir"),
    "a picture fewer": (
        lambda root: (root / "train" / "bee" / "1.png").unlink(),
        r"18 images in its train split there, 17 here",
    ),
    "another order": (
        lambda root: (root / "train" / "bee" / "1.png").rename(root / "train" / "bee" / "a.png"),
        r"the 18 images of its train split have other names or labels, or another order",
    ),
    "evaluated on others": (
        lambda root: (root / "val" / "bee" / "6.png").rename(root / "val" / "bee" / "9.png"),
        r"the 6 images of its eval split have other names",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_bound_to_its_data(stopped: tuple[Path, Path], what: str) -> None:
    path, own = stopped
    change, said = CHANGES[what]
    change(own)
    before = {file: file.read_bytes() for file in path.glob("*.json*")}
    with pytest.raises(UserError, match=said):
        run_here(path, own)
    assert {file: file.read_bytes() for file in path.glob("*.json*")} == before


@pytest.mark.parametrize("lost", [lambda file: file.unlink(), lambda file: file.write_text("{")])
def test_what_the_data_were_is_in_every_checkpoint_too(stopped: tuple[Path, Path], lost: Callable[[Path], Any]) -> None:
    path, own = stopped
    lost(path / "data.json")
    (own / "train" / "bee" / "1.png").unlink()
    with pytest.raises(UserError, match="18 images in its train split there, 17 here"):
        run_here(path, own)


OTHER_SETTINGS = {
    "data.per_class": "5", "data.fraction": "0.5", "data.sampling": "balanced", "seed": "1",
    "data.class_order": "numeric",
    "data.train_split": "train[:17]", "data.eval_split": "val[:5]", "model.classes": "bee,ant,$_$",
}  # fmt: skip


def test_a_run_is_bound_to_what_chooses_its_data(stopped: tuple[Path, Path]) -> None:
    """And to the order of its outputs: before anything is read."""
    path, own = stopped
    for key, value in OTHER_SETTINGS.items():
        more = ("--config.model.weights=sample",) if key == "model.classes" else ()
        with pytest.raises(UserError, match=rf"holds a run of another config: .*{re.escape(key)} \("):
            run_here(path, own, f"--config.{key}={value}", *more)


def test_classes_in_another_order_are_refused_whoever_means_it(stopped: tuple[Path, Path], monkeypatch) -> None:
    path, own = stopped
    real = prepare.open_splits

    def reversed_splits(config: Any) -> Any:
        return tuple(with_classes(source, source.class_names[::-1], "", "") for source in real(config))

    monkeypatch.setattr(prepare, "open_splits", reversed_splits)
    before = {file: file.read_bytes() for file in path.glob("*.json*")}
    for how in ("stop", "continue"):
        with pytest.raises(UserError, match=r"another order: output 0 is '\$_\$' there, 'bee' here; bring them into"):
            run_here(path, own, f"--config.train.on_changed_data={how}")
    assert {file: file.read_bytes() for file in path.glob("*.json*")} == before


def fingerprints(source: str, *changes: Callable[[], None]) -> list[dict[str, Any]]:
    """Of the data as they are, and after each of `changes`."""
    config = small.config(f"--config.data.source={source}", "--config.data.train_split=train",
                          "--config.data.eval_split=val")  # fmt: skip
    return [fingerprint(*open_splits(config)) for change in (lambda: None, *changes) if change() is None]


def test_a_table_and_arrays_are_known_again(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that were swapped, rows in another order, and fewer of them; that is, what `difference` says of each."""
    rows = [f"{path},{path.parent.name},{path.parts[-3]}" for path in sorted(images.rglob("*.png"))]
    table = tmp_path / "table.csv"

    def write(lines: list[str]) -> None:
        table.write_text("\n".join(["path,label,split", *lines, ""]))

    write(rows)
    swap = {"ant": "bee", "bee": "ant", "$_$": "$_$"}
    swapped = [",".join([path, swap[label], split]) for path, label, split in (row.split(",") for row in rows)]
    changes = [lambda lines=lines: write(lines) for lines in (swapped, rows[::-1], rows[1:], rows)]
    before, *after = fingerprints(f"csv:{table}", *changes)
    said = [difference(before, data) for data in after]
    assert said[0] == said[1] == "the 18 images of its train split have other names or labels, or another order"
    assert "images" in said[2]
    assert said[3] == ""

    pixels, labels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8), np.arange(20, dtype=np.int32)
    held = [Arrays(pixels, labels % 3, CLASSES)]
    monkeypatch.setitem(SOURCES, "held", lambda name, split, options: dataclasses.replace(held[0], split=split))
    others = (
        Arrays(pixels, labels % 3, ("bee", "ant", "$_$")),
        Arrays(pixels, (labels + 1) % 3, CLASSES),
        Arrays(pixels[::-1], labels % 3, CLASSES),
        Arrays(pixels[:19], labels[:19] % 3, CLASSES),
    )
    changes = [lambda other=other: held.__setitem__(0, other) for other in others]
    before, *after = fingerprints("held:", *changes)
    said = [difference(before, data) for data in after]
    assert said[0] == "other classes: output 0 is 'ant' there, 'bee' here"
    assert said[1] == said[2] == "the 20 images of its train split have other names or labels, or another order"
    assert said[3] == "20 images in its train split there, 19 here"


def test_who_means_it_goes_on_with_other_data(stopped: tuple[Path, Path]) -> None:
    path, own = stopped
    rename(own)
    run_here(path, own, "--config.train.on_changed_data=continue")
    assert records(path)[-1]["final"]
    assert ModelCard.load(path).class_names == ("$_$", "aardvark", "ant")


def test_the_same_data_elsewhere_are_the_same(finished: Path) -> None:
    data = json.loads((finished / "data.json").read_text())
    assert data["classes"] == sorted(CLASSES)
    assert (data["train"]["images"], data["eval"]["images"]) == (18, 6)
    assert difference(data, json.loads(json.dumps(data))) == ""


def test_names_with_dollars_are_drawn_as_they_are(finished: Path) -> None:
    assert "$_$" in (finished / "report.html").read_text()


def test_a_report_that_fails_costs_no_run(images: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("no font")

    monkeypatch.setattr(single, "report", fail)
    run_here(tmp_path / "a run", images, report=True)
    said = capsys.readouterr()
    again = f"`python -m jaxsft.report --workdir '{tmp_path / 'a run'}'` makes it"
    assert f"warning: no report.html could be made: RuntimeError: no font; {again}\n" in said.err
    assert not (tmp_path / "a run" / "report.html").exists()
    assert records(tmp_path / "a run")[-1]["final"]


def test_every_evaluation_leaves_a_checkpoint(images: Path, tmp_path: Path) -> None:
    run_here(tmp_path / "run", images, "--config.checkpoint.every_steps=500", "--config.eval.every_epochs=0.5")
    evaluated = [line["step"] for line in records(tmp_path / "run") if line["split"] == "eval"]
    assert evaluated == [2, 4, 6]
    assert checkpoint.steps(tmp_path / "run") == [2, 4, 6]


def test_the_terminal_says_what_goes_on(images: Path, tmp_path: Path, capsys) -> None:
    run_here(tmp_path / "run", images)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"reading folder:{images} ..."
    assert "18 images to train on" in lines[2] and "6 to evaluate on" in lines[2]
    assert lines[3] == "compiling ..."
    assert re.fullmatch(r"compiled in \d+ s", lines[4])
    line = r"epoch (1|1.5) of 1.5: training loss \d\.\d{4}, evaluation accuracy .+ \(\d of 6\), loss .+, lr .+, \d+ s"
    assert [bool(re.fullmatch(line, text)) for text in lines[5:7]] == [True, True], lines
    assert lines[7].startswith(f"{tmp_path / 'run'}: accuracy ")


def test_a_cut_config_and_a_byte_that_is_no_utf8_cost_nothing(stopped: tuple[Path, Path], finished: Path) -> None:
    path, own = stopped
    source = (path / "config.json").read_text()
    (path / "config.json").write_text(source[:40])
    with (path / "metrics.jsonl").open("ab") as log:
        log.write(b'{"step": 1, "split": "\xff"}\n')
    assert saved.read(path).step == 2
    # The checkpoint's own record names the images of the run that it was copied from.
    with pytest.raises(UserError, match="holds a run of another config: data.source"):
        run_here(path, own)
    (path / "config.json").write_text(source)
    run_here(path, own)
    assert records(path)[-1]["loss"] == records(finished)[-1]["loss"]


def test_a_picture_that_breaks_meanwhile_costs_no_step(
    stopped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    path, own = stopped
    update = training.Trainer.update

    def broken(self, steps):
        if steps[0] == 6:
            raise UserError("a.png: image file is truncated", "remove it")
        update(self, steps)

    monkeypatch.setattr(training.Trainer, "update", broken)
    with pytest.raises(Stop, match=r"a.png: image file is truncated; remove it"):
        run_here(path, own)
    assert checkpoint.steps(path)[-1] == 5
    assert "the run ends at step 5 of 6, saved in" in capsys.readouterr().err
    monkeypatch.undo()
    run_here(path, own, "--config.data.on_error=skip")  # the way out that such a message names: the same run still
    assert records(path)[-1]["final"]


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    for i in range(8):
        picture(tmp_path / "images" / "all" / f"{i}.png", i)
    with pytest.raises(UserError, match="has a single class, 'all': nothing to tell apart"):
        run_here(tmp_path / "run", tmp_path / "images")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("--config.data.batch_size=16", "--config.data.last_batch=keep"), "the last batch of an epoch leaves one"),
        (("--config.data.batch_size=1",), "a batch leaves one image of 32 px to batch norm"),
        (("--config.optim.accumulate=4",), "a batch leaves one image of 32 px to batch norm"),
    ],
)
def test_batch_norm_over_one_value_is_refused_before_the_start(tmp_path: Path, overrides, said: str) -> None:
    for i in range(19):
        picture(tmp_path / "images" / ("train" if i < 17 else "val") / "ab"[i % 2] / f"{i}.png", i)
    with pytest.raises(UserError, match=said):
        run_here(tmp_path / "run", tmp_path / "images", "--config.model.arch=resnet10_w16", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_nan_is_never_right(images: Path, tmp_path: Path) -> None:
    run_here(tmp_path / "run", images, "--config.optim.lr=1e30", "--config.train.on_nan=ignore",
             "--config.checkpoint.best_metric=accuracy")  # fmt: skip
    last = records(tmp_path / "run")[-1]
    assert (last["accuracy"], last["count"], last["loss"]) == (0.0, 6, None)
    assert set(last["per_class"].values()) == {0.0}
    with pytest.raises(UserError, match="keeps no best checkpoint"):
        saved.read(tmp_path / "run", "best")


def test_best_is_by_the_metric_and_named_to_the_commands(finished: Path, tmp_path: Path) -> None:
    path = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    config["checkpoint"]["best_metric"] = "loss"
    (path / "config.json").write_text(json.dumps(config))
    lines = [{"step": step, "split": "eval", "loss": loss} for step, loss in ((2, 0.3), (4, 0.2), (6, 0.4))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert saved.read(path).step == 6
    assert saved.read(path, "best").step == 4
    assert saved.read(path, "2").step == 2
    for which, said in (("3", "has no intact checkpoint of step 3"), ("first", "it must be last, best or a step")):
        with pytest.raises(UserError, match=said):
            saved.read(path, which)
