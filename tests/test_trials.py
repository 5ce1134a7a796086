"""`python -m jaxsft.search --space`: trials that are proposed, pruned, refused, lost and resumed, and what is left."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

optuna = pytest.importorskip("optuna")

from jaxsft import recipes, search, storage  # noqa: E402
from jaxsft.cli import UserError  # noqa: E402
from jaxsft.config import from_json, to_json  # noqa: E402
from jaxsft.flags import parse_flags  # noqa: E402
from jaxsft.run.log import NotFinite  # noqa: E402
from jaxsft.tune import report, space, study, trials  # noqa: E402
from tests import small  # noqa: E402
from tests.commands import assert_refused, hear_command  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

OPTIONS = " ".join([*small.ARGUMENTS[1:], "--config.train.epochs=2", "--config.optim.warmup_epochs=0"])
COMMAND = f"search --config tests/small.py {OPTIONS} --space @/space.py --workdir @/w"
SPACE = """SPACE = {
    "optim.lr": ("log", 1e-3, 1e-1),
    "optim.warmup_epochs": ("float", 0.5, 1),
    "data.augment": ("choice", [("flip",)]),
}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "space.py").write_text(SPACE)
    return tmp_path


class Result:
    """What is looked at of an evaluation."""

    def __init__(self, accuracy: float):
        self.accuracy = accuracy


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the next trials do in place of training: accuracies of their evaluations, or an exception; then 0.5."""
    queue: list[Any] = []

    def evaluations(config: Any, splits: Any, shared: Any, between: Any) -> Iterator[Result]:
        between()
        act = queue.pop(0) if queue else [0.5]
        if isinstance(act, BaseException):
            raise act
        yield from map(Result, act)

    monkeypatch.setattr(trials, "evaluations", evaluations)
    return queue


def table(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def states(workdir: Path) -> list[str]:
    return [row["state"] for row in table(workdir)]


def test_a_search_of_real_runs(place: Path) -> None:
    status, printed, said = hear_command(f"{COMMAND} --trials 3 --json @/out.json", place)
    assert status == 0, said
    rows = table(place / "w")
    assert [row["state"] for row in rows] == ["complete"] * 3
    assert all(0 <= float(row["value"]) <= 1 and 1e-3 <= float(row["optim.lr"]) <= 0.1 for row in rows)
    best = max(rows, key=lambda row: float(row["value"]))
    assert f"best: trial {best['number']}, accuracy {float(best['value']):.4f}" in printed
    # The config of the file is that of the trial, the command line's overrides and a tuple among it.
    found = recipes.load(str(place / "w" / "best.py"))
    expected = small.config("--config.train.epochs=2")
    expected.optim.lr = float(best["optim.lr"])
    expected.optim.warmup_epochs = float(best["optim.warmup_epochs"])
    expected.data.augment = tuple(best["data.augment"].split(","))
    assert found.to_dict() == from_json(to_json(expected)).to_dict()
    parse_flags([f"--config={place / 'w' / 'best.py'}"], "", {})
    status, printed, said = hear_command(f"{COMMAND} --trials 3", place)
    assert (status, [row["value"] for row in table(place / "w")]) == (0, [row["value"] for row in rows]), said
    assert_refused(
        COMMAND.replace("--config.optim.lr=0.05", "--config.optim.lr=0.06") + " --trials 4",
        "@/w holds another search: optim.lr (0.05 there, 0.06 here); give another --workdir",
        place,
    )


def test_what_goes_wrong_with_a_trial_is_noted_and_the_search_goes_on(place: Path, runs: list[Any]) -> None:
    runs += [NotFinite(3, "the loss is nan"), UserError("too large", "take less"), MemoryError(), [0.4], [0.7]]
    status, printed, said = hear_command(f"{COMMAND} --trials 5", place)
    assert status == 0, said
    assert states(place / "w") == ["failed", "failed", "failed", "complete", "complete"]
    reasons = [row["reason"] for row in table(place / "w")]
    assert reasons == ["the loss is nan at step 3", "too large; take less", "out of memory", "", ""]
    assert "trial 0: failed" in printed and "best: trial 4, accuracy 0.7000" in printed


def test_no_trial_that_comes_to_its_end_is_no_success(place: Path, runs: list[Any]) -> None:
    runs += [UserError("too large", "take less")] * 2
    status, _, said = hear_command(f"{COMMAND} --trials 2", place)
    assert (status, said.splitlines()[-1]) == (1, f"error: no trial came to its end; see why in {place}/w/trials.csv")


def test_a_bad_trial_is_pruned(place: Path, runs: list[Any]) -> None:
    runs += [[0.5, 0.6]] * study.FIRST + [[0.1, 0.9], [0.7, 0.8]]
    status, printed, said = hear_command(f"{COMMAND} --trials {study.FIRST + 2}", place)
    assert status == 0, said
    assert states(place / "w") == ["complete"] * study.FIRST + ["pruned", "complete"]
    assert "best: trial 6, accuracy 0.8000" in printed


def test_folds_are_averaged(place: Path, runs: list[Any]) -> None:
    runs += [[0.1, 0.5], [0.2, 0.7], [0.9]]
    status, printed, said = hear_command(f"{COMMAND} --trials 1 --folds 3", place)
    assert (status, "best: trial 0, accuracy 0.7000" in printed) == (0, True), said


def test_a_lost_trial_is_told_and_no_other_is_lost(place: Path, runs: list[Any]) -> None:
    assert hear_command(f"{COMMAND} --trials 2", place)[0] == 0
    before = table(place / "w")
    dimensions = space.load(str(place / "space.py"), small.config())
    kept = study.Study(place / "w", dimensions, seed=0)
    dead, _, unknown = (kept.begin(9) for _ in range(3))  # the second is of this process, which lives
    me = study.this_process()
    dead.set_user_attr(study.OWNER, {**me, "process": 2**22 + 1})
    elsewhere = {**me, "host": "elsewhere"}
    unknown.set_user_attr(study.OWNER, {**elsewhere, study.SEEN: time.time() - study.SILENT / 2})
    status, printed, said = hear_command(f"{COMMAND} --trials 5", place)
    assert (status, said.splitlines()[1:]) == (0, ["warning: trial 2 was lost: its process ended"])
    assert states(place / "w") == ["complete", "complete", "lost", "running", "running", "complete"]
    assert table(place / "w")[:2] == before
    assert "trial 3 is still running in another process" in printed
    unknown.set_user_attr(study.OWNER, {**elsewhere, study.SEEN: time.time() - study.SILENT - 1})
    status, _, said = hear_command(f"{COMMAND} --trials 5", place)
    assert (status, said.splitlines()[1:]) == (0, ["warning: trial 4 was lost: its process ended"])
    assert states(place / "w") == ["complete", "complete", "lost", "running", "lost", "complete", "complete"]


def test_a_search_in_a_bucket(place: Path, runs: list[Any], google: Any) -> None:
    command, there = COMMAND.replace("@/w", "gs://bucket/search"), storage.location("gs://bucket/search")
    runs += [[0.3], [0.6]]
    assert hear_command(f"{command} --trials 2", place)[0] == 0
    status, printed, said = hear_command(f"{command} --trials 3", place)
    assert status == 0, said
    rows = list(csv.DictReader((there / "trials.csv").read_text().splitlines()))
    assert [row["value"] for row in rows] == ["0.3", "0.6", "0.5"]
    assert "best: trial 1, accuracy 0.6000; gs://bucket/search/best.py, copied here, is its config" in printed
    assert {path.name for path in there.iterdir()} == {
        "best.py",
        "importance.png",
        "search.json",
        "study.db",
        "trials.csv",
    }


def test_what_is_proposed_does_not_depend_on_interruptions(place: Path, runs: list[Any]) -> None:
    runs += [[value] for value in np.linspace(0.2, 0.8, 5)]
    assert hear_command(f"{COMMAND} --trials 5", place)[0] == 0
    at_once = [row["optim.lr"] for row in table(place / "w")]
    assert len(set(at_once)) == 5
    runs += [[value] for value in np.linspace(0.2, 0.8, 5)]
    for most in (2, 5):
        assert hear_command(f"{COMMAND.replace('@/w', '@/v')} --trials {most}", place)[0] == 0
    assert [row["optim.lr"] for row in table(place / "v")] == at_once


def test_a_signal_ends_the_trial_and_the_same_command_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluations(config: Any, splits: Any, shared: Any, between: Any) -> Iterator[Result]:
        signal.raise_signal(signal.SIGTERM)
        between()
        yield Result(0.5)

    monkeypatch.setattr(trials, "evaluations", evaluations)
    handler = signal.getsignal(signal.SIGTERM)
    status, _, said = hear_command(f"{COMMAND} --trials 1", place)
    assert status == 128 + signal.SIGTERM
    assert said.splitlines()[-1] == "stopped: SIGTERM in trial 0, which is lost; the same command goes on"
    assert signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.setattr(trials, "evaluations", lambda *what: iter([Result(0.25)]))
    assert hear_command(f"{COMMAND} --trials 1", place)[0] == 0
    assert states(place / "w") == ["lost", "complete"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SPACE = {}", "the space file @/space.py defines no SPACE; write SPACE = ..."),
        ("SPACE = {", "@/space.py, line 1: '{' was never closed; mend the space file"),
        ("SPACE = 1 / 0", "@/space.py, line 1: ZeroDivisionError: division by zero; mend the space file"),
        ("optim.leer: ('log', 1, 2)", "OF has the key 'optim.leer', which the config has not; ..."),
        ("data.source: ('choice', ['sample'])", "OF has the key 'data.source'; leave it out: ..."),
        ("optim.lr: 3", "OF: optim.lr is 3; write it as ..."),
        ("optim.lr: ('lag', 1, 2)", "OF: optim.lr is ('lag', 1, 2); did you mean 'log'?"),
        ("optim.lr: ('log', 0, 2)", "OF: optim.lr is ('log', 0, 2); the lowest of 'log' must be above 0"),
        ("optim.lr: ('log', 2, 1)", "OF: optim.lr is ('log', 2, 1); the lowest must be less than ..."),
        ("optim.lr: ('float', 0, 1)", "OF: optim.lr has 0.0; it must be a number, above 0"),
        ("optim.momentum: ('float', 0.5, 1)", "OF: optim.momentum has 1.0; it must be a number, 0 to..."),
        ("data.batch_size: ('float', 1, 2)", "OF: data.batch_size is ('float', 1, 2); write 'int': ..."),
        ("data.batch_size: ('int', 1, 2.5)", "OF: data.batch_size is ('int', 1, 2.5); both ends must..."),
        ("optim.name: ('float', 1, 2)", "OF: optim.name is ('float', 1, 2); it must be ('choice', ..."),
        ("optim.name: ('choice', ['sgd', 'adam'])", "OF: optim.name has 'adam'; it must be 'sgd', ..."),
        ("data.augment: ('choice', [('flop',)])", "OF: data.augment has 'flop'; did you mean 'flip'?"),
        ("optim.nesterov: ('choice', [1])", "OF: optim.nesterov has 1; it must be true or false"),
    ],
)
def test_a_wrong_space_is_one_line(text: str, expected: str, tmp_path: Path) -> None:
    key, colon, entry = text.partition(": ")
    (tmp_path / "space.py").write_text(f"SPACE = {{{key!r}: {entry}}}" if colon else text)
    assert_refused(f"{COMMAND} --trials 3", re.sub("^OF", "SPACE of @/space.py", expected), tmp_path)
    assert not (tmp_path / "w").exists()


def test_without_optuna(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.importlib.util, "find_spec", lambda name: None)
    assert_refused(
        f"{COMMAND} --trials 1", "Optuna is not installed; install the extra: pip install 'jaxsft[search]'", place
    )
    assert not (place / "w").exists()


def test_a_whole_number_of_a_float_key_and_a_tuple_are_the_configs() -> None:
    config = small.config()
    dimensions = (
        space.dimension("SPACE", "train.epochs", ("int", 2, 8)),
        space.dimension("SPACE", "data.augment", ("choice", [["flip"], []])),
        space.dimension("SPACE", "data.batch_size", ("log", 8, 64)),
    )
    found = space.config_of(config, dimensions, {"train.epochs": 3, "data.augment": "flip", "data.batch_size": 9})
    assert (found.train.epochs, found.data.augment, found.data.batch_size) == (3.0, ("flip",), 9)
    assert isinstance(study.distribution(dimensions[2]), optuna.distributions.IntDistribution)
    assert config.data.batch_size == 16


def test_a_recipe_is_found_from_anywhere() -> None:
    assert report.recipe_from_anywhere("configs/cifar10.py:sample") == "cifar10:sample"
    assert report.recipe_from_anywhere("tests/small.py") == str(ROOT / "tests" / "small.py")


def start(place: Path, cache: Path, count: int) -> subprocess.Popen[str]:
    """The command as a process of its own; its output in a file."""
    words = COMMAND.replace("@", str(place)).split()[1:]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    log = (place / "log").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "jaxsft.search", *words, f"--trials={count}"],
        cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.full
def test_killed_in_a_trial_and_several_processes(place: Path, cache: Path) -> None:
    assert search.FEWEST_FOLDS == 2
    first = start(place, cache, 8)
    deadline = time.monotonic() + 300
    while "trial 1: complete" not in (place / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.wait()
    done = len((place / "log").read_text().split(": complete")) - 1
    assert 2 <= done < 8
    others = [start(place, cache, 8) for _ in range(2)]
    assert [other.wait(timeout=300) for other in others] == [0, 0], (place / "log").read_text()
    said = (place / "log").read_text()
    found = states(place / "w")
    assert said.count("was lost: its process ended") == found.count("lost") <= 1
    assert found.count("complete") + found.count("pruned") == 8
    assert found[:done] == ["complete"] * done
