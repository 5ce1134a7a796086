"""A report made of a run, by the command, from its folder, whatever of it is gone; and what a run notes of machines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxsft.cli import UserError
from jaxsft.data.base import Arrays
from jaxsft.interpret.mistakes import unsure
from jaxsft.interpret.report import single
from jaxsft.run import reporting, starts
from jaxsft.run.parallel import DataParallel
from tests import small
from tests.commands import assert_refused, hear_command
from tests.test_report import outline


def test_pictures_that_are_gone_are_counted() -> None:
    class Gone(Arrays):
        def __getitem__(self, index: int) -> np.ndarray:
            if index % 2:
                raise OSError("gone")
            return super().__getitem__(index)

    source = Gone(np.zeros((6, 8, 8, 3), np.uint8), np.zeros(6, np.int32), ("a", "b"))
    answers = {"example": np.arange(6), "label": np.zeros(6, np.int32), "predicted": np.ones(6, np.int32),
               "probability": np.full(6, 0.5)}  # fmt: skip
    found = reporting.pictured(source, np.arange(6), answers, ("a", "b"))
    assert len(found.pictures) == 3 and found.missing == "3 of 6 images could not be read."
    assert reporting.pictured(source, np.arange(0), answers, ("a", "b")).missing == "There are none."


def test_reading_pictures_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "SECONDS", -1.0)
    source = Arrays(np.zeros((6, 8, 8, 3), np.uint8), np.zeros(6, np.int32), ("a", "b"))
    answers = {name: np.zeros(6, np.int32) for name in ("example", "label", "predicted", "probability")}
    assert len(reporting.pictured(source, np.arange(6), answers, ("a", "b")).pictures) == 1


def test_the_least_sure_come_first() -> None:
    probability = np.array([0.9, np.nan, 0.3, 0.5])
    assert unsure({"probability": probability}, 2).tolist() == [2, 3]
    logits = np.array([[3.0, -0.1], [2.0, 2.0], [0.5, -9.0]])
    assert unsure({"probability": np.ones(3), "logits": logits}, 2).tolist() == [0, 2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is over, without its report."""
    workdir = tmp_path_factory.mktemp("runs") / "a run"
    small.run_here(workdir, "--config.train.epochs=1")
    return workdir


def test_the_command_makes_it(run: Path, tmp_path: Path) -> None:
    status, said, errors = hear_command(f"report --workdir '{run}'", tmp_path)
    assert (status, said) == (0, f"{run / 'report.html'}\n"), errors
    found = outline((run / "report.html").read_bytes())
    assert "finished after 1 epochs, 4 steps" in found.text and "on 40 images" in found.text
    assert "1 x cpu" in found.text and "jaxlib" in found.text
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{100 * last['accuracy']:.1f} %" in found.text
    wrong = 40 - round(40 * last["accuracy"])
    assert len(found.of("img")) == min(wrong, 24) + 24 + 16
    (run / "report.html").unlink()


def test_the_command_compares(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "b")
    begun = tmp_path / "begun"  # a run that has no checkpoint yet
    begun.mkdir()
    for name in ("config.json", "model.json", "data.json"):
        shutil.copy(run / name, begun)
    command = f"report --workdir '{run}' @/b @/begun --out @/c.html"
    status, said, errors = hear_command(command, tmp_path)
    assert (status, said) == (0, f"{tmp_path / 'c.html'}\n"), errors
    text = outline((tmp_path / "c.html").read_bytes()).text
    assert "a run, b and begun compared" in text and "begun: It could not be evaluated:" in text
    assert "has no checkpoint yet" in text


def test_images_that_are_gone_cost_no_report(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "r")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    config["data"]["source"] = "folder:/nowhere"
    (tmp_path / "r" / "config.json").write_text(json.dumps(config))
    known = reporting.of_workdir(tmp_path / "r")
    assert "/nowhere" in known.missing and known.is_finished and known.metrics()["accuracy"]
    assert "It could not be evaluated" in outline(single.report(known)).text
    with pytest.raises(UserError, match="nowhere"):
        reporting.of_workdir(tmp_path / "r", data="folder:/nowhere")


def test_wrong_commands_are_one_line(run: Path, tmp_path: Path) -> None:
    assert_refused(
        "report --workdir @/none", "@/none holds no run; give the --workdir of `python -m jaxsft.train`", tmp_path
    )
    assert_refused(f"report --workdir '{run}' @/none --out @/x.html", "@/none holds no run; ...", tmp_path)
    assert_refused("report --workdir a b", "--out is missing: a report on several runs is no one's; ...", tmp_path)
    assert_refused(f"report --workdir '{run}' --out @/no/x.html", "@/no/x.html can't be written: ...", tmp_path)
    assert_refused(
        f"report --workdir '{run}' --checkpoint 7", f"{run} has no intact checkpoint of step 7; ...", tmp_path
    )
    assert not list(tmp_path.iterdir()) and not (run / "report.html").exists()


def test_starts_are_noted_and_those_that_are_undone_forgotten(run: Path, tmp_path: Path) -> None:
    (start,) = starts.read(run)
    assert start["step"] == 0 and start["device_count"] == 1 and start["versions"]["jax"] and start["cores"] >= 1
    entries = [{**start, "step": step} for step in (0, 4, 8)]
    (tmp_path / starts.MACHINES).write_text(json.dumps(entries))
    starts.note(tmp_path, 6, DataParallel(), "float32")
    assert [entry["step"] for entry in starts.read(tmp_path)] == [0, 4, 6]
    (tmp_path / starts.MACHINES).write_text("{")
    assert starts.read(tmp_path) == []


def test_the_commit_is_read_where_there_is_one(tmp_path: Path) -> None:
    assert starts.commit(tmp_path / ".git") == ""
    git = tmp_path / ".git"
    git.mkdir()
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\nabc refs/heads/main\n")
    assert starts.commit(git) == "abc"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "refs" / "heads" / "main").write_text("def\n")
    assert starts.commit(git) == "def"
    tree = git / "worktrees" / "one"
    tree.mkdir(parents=True)
    (tree / "HEAD").write_text("ref: refs/heads/main\n")
    (tree / "commondir").write_text("../..\n")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / ".git").write_text("gitdir: ../.git/worktrees/one\n")
    assert starts.commit(tmp_path / "one" / ".git") == "def"
    (git / "HEAD").write_text("0123\n")
    assert starts.commit(git) == "0123"
