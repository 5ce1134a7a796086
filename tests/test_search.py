"""`python -m jaxsft.search`: folds, the range test, and that many runs share one set on the devices and one program."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.model_selection import StratifiedKFold

from jaxsft.cli import UserError
from jaxsft.data.base import Arrays, Part
from jaxsft.data.loader import make_loader
from jaxsft.data.order import Order
from jaxsft.data.reading import EvalPlan, TrainPlan
from jaxsft.data.splits import folds as folds_of
from jaxsft.models.weights import Preprocessing
from jaxsft.run import training
from jaxsft.run.parallel import DataParallel
from jaxsft.run.prepare import prepare
from jaxsft.run.shared import Shared
from jaxsft.tune import folds, loop, pool, range_test
from jaxsft.tune.range_test import Curve, proposals
from tests import small
from tests.commands import assert_refused, hear_command

SEARCH = "search --config tests/small.py"
QUICK = ("--config.train.epochs=2", "--config.eval.every_epochs=1", "--config.optim.warmup_epochs=0")
OPTIONS = " ".join([*small.ARGUMENTS[1:], *QUICK])


@pytest.mark.parametrize(("sizes", "count"), [((50, 50, 50), 5), ((7, 13, 100, 5), 5), ((2, 9, 31), 3), ((3, 3), 6)])
def test_folds_are_stratified_as_scikit_learns(sizes: tuple[int, ...], count: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    fold = folds_of(labels, count, seed=3)
    table = np.array([[np.sum((fold == f) & (labels == label)) for label in range(len(sizes))] for f in range(count)])
    assert table.sum() == len(labels)
    assert np.ptp(table, axis=0).max() <= 1  # of a class no fold has two more than another
    assert np.ptp(table.sum(1)) <= 1
    if min(sizes) >= count:  # scikit-learn warns or refuses else
        parts = StratifiedKFold(count, shuffle=True, random_state=0).split(labels, labels)
        theirs = np.array([np.bincount(labels[test], minlength=len(sizes)) for _, test in parts])
        assert np.array_equal(np.sort(theirs, axis=0), np.sort(table, axis=0))
    assert np.array_equal(fold, folds_of(labels, count, seed=3))
    assert not np.array_equal(fold, folds_of(labels, count, seed=4))


def test_a_part_of_an_array_is_loaded_as_its_images_alone_would_be() -> None:
    random = np.random.default_rng(1)
    whole = Arrays(random.integers(0, 256, (20, 4, 4, 3), np.uint8), np.arange(20, dtype=np.int32) % 3, ("a", "b", "c"))
    rows = np.array([1, 4, 5, 9, 12, 13, 19], np.int32)
    part, alone = Part(whole, rows), whole.select(rows)
    assert (len(part), part.name(2), part.class_names) == (7, "image 5", whole.class_names)
    devices = DataParallel(devices=jax.devices()[:1])
    for plan in (TrainPlan(Order(7, 3, seed=0), partners=True), EvalPlan(7, 4)):
        ours, theirs = (make_loader(source, plan, devices, Preprocessing()) for source in (part, alone))
        for step in range(2):
            mine, other = ours.batch(step), theirs.batch(step)
            for role in mine.keys() - {"mask"}:
                for name in ("images", "labels"):
                    assert np.array_equal(ours.dataset[name][mine[role]], theirs.dataset[name][other[role]])
            assert np.array_equal(mine.get("mask"), other.get("mask"))


def parts(config: ConfigDict) -> pool.Pool:
    return pool.open_pool(config, 3)


def test_cross_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, place = f"{SEARCH} {OPTIONS} --folds 3 --workdir @/cv --json @/out.json", tmp_path / "cv"
    done: list[Path] = []

    def killed(config: ConfigDict, run: Path, **how: Any) -> None:
        if len(done) == 1:
            raise UserError("killed", "in the second fold")
        done.append(run)
        small_train(config, run, **how)

    small_train = folds.train
    monkeypatch.setattr(training, "write_report", lambda *what: None)
    monkeypatch.setattr(folds, "train", killed)
    assert hear_command(command, tmp_path)[0] == 2
    assert not (place / "folds.json").exists()
    monkeypatch.setattr(folds, "train", small_train)
    status, printed, said = hear_command(command, tmp_path)
    assert status == 0, said
    assert f"{place}/fold-1: finished at step 4, accuracy" in printed
    result = json.loads((place / "folds.json").read_text())
    assert json.loads((tmp_path / "out.json").read_text()) == result
    for name in ("accuracy", "loss"):
        values = [run[name] for run in result["runs"]]
        assert np.isclose(result[name]["mean"], statistics.mean(values))
        assert np.isclose(result[name]["sd"], statistics.stdev(values))
    with (place / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == folds.COLUMNS
    assert [int(row["example"]) for row in rows] == list(range(64))
    for run in result["runs"]:
        own = [row for row in rows if int(row["fold"]) == run["fold"]]
        assert len(own) == run["evaluated"] == 64 - run["trained"]
        assert np.isclose(np.mean([row["label"] == row["predicted"] for row in own]), run["accuracy"])
    table = printed[printed.index("fold    trained on") :].splitlines()
    assert [line.split()[0] for line in table[:6]] == ["fold", "1", "2", "3", "mean", "sd"]
    status, printed, said = hear_command(command, tmp_path)
    assert (status, printed.count(": finished at step 4")) == (0, 3), said
    assert_refused(
        command.replace("--folds 3", "--folds 4"),
        "@/cv holds another search: folds (3 there, 4 here); give another --workdir",
        tmp_path,
    )


def curve(loss_of_exponent: Any) -> Curve:
    exponents = np.linspace(-6, 1, 100)
    values = np.array([loss_of_exponent(e) for e in exponents])
    return Curve(10**exponents, values, values)


def test_proposals_on_a_curve_that_falls_between_two_rates() -> None:
    # Flat to 1e-4, falls to 1e-1 with its steepest place at 1e-2, then rises.
    def loss(e: float) -> float:
        if e < -4:
            return 2.0
        return 2 - 1 / (1 + np.exp(-4 * (e + 2))) + (np.exp(3 * (e + 1)) if e > -1 else 0)

    found = proposals(curve(loss))
    assert np.isclose(np.log10(found["steepest"]), -2, atol=0.1)
    assert np.isclose(np.log10(found["minimum/10"]), -1 - 1, atol=0.15)
    # The valley goes from 1e-4 to 1e-1; its middle is where fastai proposes.
    assert np.isclose(np.log10(found["valley"]), -2.5, atol=0.2)
    assert set(found) == {"valley", "steepest", "minimum/10"}


def test_the_valley_is_fastais() -> None:
    # By hand: the falling choice 5 4 3 2 1 0.5 of places 3 .. 8 is the longest, and is followed back by its length, 6,
    # from its end 8 to 2; a third is 2, and the proposal lies at 2 + 2 + 1.
    assert range_test.valley(np.array([5.0, 5, 5, 5, 4, 3, 2, 1, 0.5, 7, 8])) == 5


def test_too_short_a_curve_is_refused() -> None:
    short = Curve(*(np.ones(12) for _ in range(3)))
    with pytest.raises(UserError, match="diverged after 12 updates"):
        proposals(short)


def test_the_range_test_stops_where_the_loss_explodes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small.config(*QUICK, "--config.train.steps=40")
    seen = iter([2.0] * 20 + [1e3] * 20)
    monkeypatch.setattr(range_test, "training_losses", lambda job: seen)
    monkeypatch.setattr(range_test, "prepare", lambda *what: (_Job(), "a model; data"))
    found = range_test.measure(config, range_test.rising(1e-3, 1, 40))
    assert len(found.losses) == 21  # 0.98 ** 20 of the weights are on twenty losses of 2, the rest on one of 1000
    assert np.isclose(found.smoothed[5], 2)
    assert found.smoothed[-1] > 4 * found.smoothed.min()


class _Job:
    """What `measure` touches of a job."""

    class train_loader:  # noqa: N801
        dataset: dict[str, Any] = {}  # noqa: RUF012

    class order:  # noqa: N801
        steps_per_epoch = 4

    class parallel:  # noqa: N801
        replicate = staticmethod(lambda tree: tree)


def test_the_range_test_as_a_command(tmp_path: Path) -> None:
    command = f"{SEARCH} {OPTIONS} --config.train.steps=30 --lr-range 1e-4:1 --workdir @/lr"
    status, printed, said = hear_command(command, tmp_path)
    assert status == 0, said
    result = json.loads((tmp_path / "lr" / "lr_range.json").read_text())
    assert np.allclose(result["rates"], np.geomspace(1e-4, 1, 30)[: len(result["rates"])])
    assert f"--config.optim.lr={result['proposal']:.2g} is proposed (valley)" in printed
    assert (tmp_path / "lr" / "lr_range.png").read_bytes().startswith(b"\x89PNG")
    # The first loss is that of the network before any update, the second follows from the lowest rate.
    config = small.config(
        *QUICK, "--config.train.steps=2", "--config.optim.schedule=constant", "--config.optim.lr=1e-4"
    )
    whole = pool.part(parts(config).source, np.arange(64, dtype=np.int32))
    job, _ = prepare(config, (whole, whole), Shared())
    assert np.allclose(list(loop.training_losses(job)), result["losses"][:2], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", "what to search for is not said, or twice; give one of --folds, --lr-range and --space"),
        ("--folds 3 --lr-range", "what to search for is not said, or twice; give one of ..."),
        ("--folds 1", "--folds is '1'; it must be a whole number, 2 or more"),
        ("--folds 65", "--folds is 65; there are 64 training images: take fewer"),
        ("--folds 3 --trials 4", "--space and --trials belong together; give both, or neither"),
        ("--space @/s.py", "--space and --trials belong together; give both, or neither"),
        ("--lr-range=1:0.1", "--lr-range is '1:0.1'; it must be LOW:HIGH, two rates above 0, such as 1e-6:10"),
        ("--lr-range=0:1", "--lr-range is '0:1'; it must be LOW:HIGH, ..."),
        ("--lr-range 3", "--lr-range is '3'; it must be LOW:HIGH, ..."),
        ("--folds 3 --workdir @", "@ is not empty and holds no search; give another --workdir"),
        ("--folds 2 --config.data.batch_size=48", "config.data.batch_size 48 is more than the 32 training images; ..."),
    ],
)
def test_what_cant_be_is_one_line(options: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    workdir = "" if "--workdir" in options else "--workdir @/w"
    assert_refused(f"{SEARCH} {OPTIONS} {options} {workdir}", expected, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_mean_and_deviation_are_of_a_sample() -> None:
    runs = [{"accuracy": a, "loss": 2 * a} for a in (0.5, 0.7, 0.9)]
    assert folds.over(runs)["accuracy"] == {
        "mean": pytest.approx(0.7),
        "sd": pytest.approx(np.std([0.5, 0.7, 0.9], ddof=1)),
    }
