"""Images with any number of labels: metrics held to scikit-learn, steps to torch, and a run of them end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
import torch
from sklearn import metrics as sklearn

import jaxsft
from jaxsft.cli import UserError
from jaxsft.data.augment import preprocess
from jaxsft.data.base import Arrays
from jaxsft.data.sources import check_labels, open_splits, with_classes
from jaxsft.data.splits import divided, strata, subset
from jaxsft.flags import parse_flags
from jaxsft.interpret import multilabel
from jaxsft.interpret.mistakes import rank
from jaxsft.interpret.multilabel import MultiLabelEvaluation
from jaxsft.learn import objective
from jaxsft.learn.losses import balanced_weights, make_loss
from jaxsft.learn.objective import Inputs, Objective
from jaxsft.learn.state import TrainState
from jaxsft.learn.steps import make_eval_step, make_train_step
from jaxsft.models.weights import ModelCard
from jaxsft.parity.oracle import nchw
from jaxsft.run import checkpoint, prepare, program, saved, training, workdir
from jaxsft.run.log import records
from tests import small, tiny
from tests.commands import hear_command
from tests.tiny import CLASSES, Tiny, compiled

ROWS, BATCH = 203, 64  # the last batch holds 11
LR, SIZE = 0.1, 16


@pytest.fixture
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def draw(classes: int, levels: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [ROWS, classes] that know something of the labels, 0 and 1; with `levels` mostly equal ones."""
    rng = np.random.default_rng(classes)
    labels = (rng.random((ROWS, classes)) < rng.uniform(0.05, 0.7, classes)).astype(np.uint8)
    logits = rng.standard_normal((ROWS, classes)) + 1.2 * labels - 0.6
    return (np.round(levels * logits) / levels if levels else logits), labels


def evaluate(logits: np.ndarray, labels: np.ndarray) -> MultiLabelEvaluation:
    """Batch by batch, the last one filled with rows that are masked."""
    batches: list[dict[str, Any]] = []
    for start in range(0, len(labels), BATCH):
        numbers = np.arange(start, start + BATCH)
        rows, mask = np.minimum(numbers, len(labels) - 1), numbers < len(labels)
        scores, label = jnp.asarray(logits[rows]), labels[rows]
        answers = {**multilabel.answer(scores, label), "loss": make_loss(name="bce")(scores, label)}
        batches.append({**jax.device_get(answers), "logits": logits[rows], "label": label, "mask": mask})
    return MultiLabelEvaluation.of(batches, logits.shape[1])


def assert_scikit_learns(found: MultiLabelEvaluation, logits: np.ndarray, labels: np.ndarray) -> None:
    """Of the classes that have examples; the others are nowhere."""
    predicted, present = logits > 0, labels.any(0)
    of_each = {k: sklearn.average_precision_score(labels[:, k], logits[:, k]) for k in np.flatnonzero(present)}
    assert found.count == len(labels)
    assert found.accuracy == pytest.approx(sklearn.accuracy_score(labels, predicted), rel=1e-15)
    assert found.map == pytest.approx(np.mean([*of_each.values()]), rel=1e-13)
    np.testing.assert_allclose(found.per_class()[present], [*of_each.values()], rtol=1e-13)
    assert np.isnan(found.per_class()[~present]).all()
    options: dict[str, Any] = {"zero_division": np.nan}
    np.testing.assert_array_equal(found.f1, sklearn.f1_score(labels, predicted, average=None, **options))
    assert found.f1_micro == pytest.approx(sklearn.f1_score(labels, predicted, average="micro", **options), rel=1e-15)
    assert found.f1_macro == pytest.approx(sklearn.f1_score(labels, predicted, average="macro", **options), rel=1e-15)
    np.testing.assert_array_equal(found.positives, labels.sum(0))


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("levels", [0, 1, 4])
def test_metrics_are_scikit_learns(levels: int) -> None:
    """With ties among the scores, too, a class without positives, and one that besides is never predicted."""
    for classes in (2, 7):
        logits, labels = draw(classes, levels)
        if classes == 7:
            labels[:, 3] = labels[:, 5] = 0
            logits[:, 5] = -1
        found = evaluate(logits, labels)
        assert_scikit_learns(found, logits, labels)
        plain = torch.nn.BCEWithLogitsLoss()(torch.tensor(logits), torch.tensor(labels, dtype=torch.float64))
        assert found.loss == pytest.approx(plain.item(), rel=1e-12)


def test_average_precision_knows_no_order() -> None:
    logits, labels = draw(3, levels=1)
    order = np.random.default_rng(1).permutation(ROWS)
    assert evaluate(logits, labels).map == evaluate(logits[order], labels[order]).map
    same = np.zeros((ROWS, 3))
    np.testing.assert_allclose(evaluate(same, labels).precision, labels.mean(0), rtol=1e-15)  # no one gains by it


def test_a_row_with_a_nan_is_wrong_and_ranks_last() -> None:
    logits, labels = draw(4)
    broken = np.arange(ROWS) % 4 == 1
    labels[0], labels[1] = 0, 0
    logits[broken, 2] = np.nan
    found = evaluate(logits, labels)
    cleaned = np.where(broken[:, None], -1e9, logits)
    assert np.isnan(found.loss)
    assert found.map == pytest.approx(sklearn.average_precision_score(labels, cleaned, average="macro"), rel=1e-13)
    right = ((cleaned > 0) == labels).all(1) & ~broken
    assert found.accuracy == pytest.approx(right.mean())


def test_a_record_is_json_and_a_summary_one_line() -> None:
    logits, labels = draw(3)
    labels[:, 1] = 0
    logits[:, 1] = -1
    found = evaluate(logits, labels)
    record = json.loads(json.dumps(found.record(("a", "b", "c")), allow_nan=False))
    assert {key: record[key] for key in found.scalars()} == found.scalars()
    assert record["per_class"] == {"a": found.precision[0], "b": None, "c": found.precision[2]}
    assert (record["f1_per_class"]["b"], record["positives"]["b"]) == (None, 0)
    right = round(found.accuracy * ROWS)
    assert found.summary() == (
        f"mAP {found.map:.4f}, F1 {found.f1_micro:.4f} (micro) {found.f1_macro:.4f} (macro), all labels right"
        f" {right / ROWS:.4f} ({right} of {ROWS}), loss {found.loss:.4f}"
    )


def several(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Images as `tiny.batch`, and labels uint8 [SIZE, CLASSES], some rows without any."""
    labels = (np.random.default_rng([8, number]).random((SIZE, CLASSES)) < 0.4).astype(np.uint8)
    return tiny.batch(number, SIZE)[0], labels


def on_devices(devices: int, body: Any, first: Any, batch: dict[str, np.ndarray]) -> Any:
    """What each of several devices comes to, which must be the same."""
    parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
    everywhere = compiled(jax.vmap(body, (None, None, 0), axis_name="batch"))(first, {}, parts)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), everywhere)
    return jax.tree.map(lambda x: x[0], everywhere)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(("devices", "mixed"), [(1, False), (1, True), (4, False)])
def test_an_update_is_torchs(devices: int, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the plain mean of BCEWithLogitsLoss, of mixed images on mixed labels, also in parts on several devices."""
    monkeypatch.setattr(objective, "mix", lambda key, x, partners, *_: (0.3 * x + 0.7 * partners, 0.3))
    (images, labels), partner = several(0), np.roll(np.arange(SIZE), 1)
    batch: dict[str, np.ndarray] = {"example": np.arange(SIZE, dtype=np.int32), "image": images, "label": labels}
    targets = torch.tensor(labels, dtype=torch.float64)
    if mixed:
        batch |= {"partner": partner, "partner_image": images[partner], "partner_label": labels[partner]}
        images, targets = 0.3 * images + 0.7 * images[partner], 0.3 * targets + 0.7 * targets[partner]
    optimizer, weights = optax.sgd(LR), (0.2, 1.0, 3.0, 0.7)
    model = Tiny(axis_name="batch") if devices > 1 else Tiny()
    aim = Objective(model, Inputs(None), make_loss(0.0, weights, name="bce"), 0.5 if mixed else 0.0)
    state = TrainState.create(jax.tree.map(jnp.asarray, tiny.variables()), optimizer)
    if devices == 1:
        state, counts = compiled(make_train_step(aim, optimizer))(state, {}, batch)
    else:
        body = make_train_step(aim, optimizer, axis_name="batch")
        state, counts = on_devices(devices, body, state, batch)
    theirs = tiny.in_torch(tiny.variables()).train()
    logits = theirs(nchw(images))
    loss = torch.nn.BCEWithLogitsLoss(torch.tensor(weights, dtype=torch.float64))(logits, targets)
    loss.backward()
    torch.optim.SGD(theirs.parameters(), LR).step()
    assert float(counts["loss"] / counts["count"]) == pytest.approx(loss.item(), rel=1e-12)
    assert int(counts["top1"]) == int(((logits > 0).numpy() == labels).all(1).sum())
    expected = theirs.state_dict()
    for name, value in tiny.state_dict(state.variables()).items():
        np.testing.assert_allclose(value, expected[name].numpy(), rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_is_exact_whatever_the_devices_and_the_padding(devices: int) -> None:
    """Two batches, of the second 3 of 16 examples count: six of eight devices have nothing but padding."""
    values = jax.tree.map(jnp.asarray, tiny.variables())
    model = tiny.in_torch(tiny.variables()).eval()
    results, logits, labels = [], [], []
    for number, count in enumerate((SIZE, 3)):
        images, label = several(number)
        mask, example = np.arange(SIZE) < count, np.arange(SIZE, dtype=np.int32)
        batch = {"example": example, "image": images, "label": label, "mask": mask}
        parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        of_devices = compiled(jax.vmap(make_eval_step(Tiny(), None), (None, None, 0)))(values, {}, parts)
        results.append(jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), of_devices))
        logits.append(model(nchw(images[:count])).detach().numpy())
        labels.append(label[:count])
    scores, has = np.concatenate(logits), np.concatenate(labels)
    found = MultiLabelEvaluation.of(results, tiny.CLASSES)
    assert_scikit_learns(found, scores, has)
    loss = torch.nn.BCEWithLogitsLoss()(torch.tensor(scores), torch.tensor(has).double())
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    kept = found.answers
    np.testing.assert_array_equal(kept["predicted"], scores > 0)
    probability = np.abs(1 / (1 + np.exp(-scores)) - has)  # of what each label is not
    np.testing.assert_allclose(kept["probability"], probability.max(1), rtol=1e-12)
    wrong = np.flatnonzero(((scores > 0) != has).any(1))
    assert rank(kept, 99).tolist() == sorted(wrong, key=lambda row: -probability[row].max())


def test_images_are_divided_by_their_rarest_label() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 3)) < (0.7, 0.3, 0.05)).astype(np.uint8)
    groups = strata(labels)
    expected = np.where(labels[:, 2], 2, np.where(labels[:, 1], 1, np.where(labels[:, 0], 0, 3)))
    np.testing.assert_array_equal(groups, expected)
    assert strata(np.array([[1, 1], [0, 0]])).tolist() == [0, 2]
    train, held_out = divided(groups, 0.25, seed=0)
    assert sorted([*train, *held_out]) == list(range(400))
    np.testing.assert_allclose(np.bincount(groups[held_out]), 0.25 * np.bincount(groups), atol=0.5)
    assert np.bincount(groups[subset(labels, 1.0, 5, seed=0)]).tolist() == [5, 5, 5, 5]


def arrays(labels: np.ndarray, names: tuple[str, ...] = ("a", "b", "c")) -> Arrays:
    return Arrays(np.zeros((len(labels), 8, 8, 3), np.uint8), labels, names)


def test_classes_of_several_labels_are_renumbered() -> None:
    labels = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 0]], np.uint8)
    found = with_classes(arrays(labels), ("c", "x", "a"), "eval", "train")
    assert found.labels.tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 0]] and found.labels.dtype == np.uint8
    with pytest.raises(UserError, match="eval has the class 'c', which train lacks"):
        with_classes(arrays(labels), ("a", "b"), "eval", "train")


@pytest.mark.parametrize(
    "labels", [np.eye(3, dtype=np.int32), 2 * np.eye(3, dtype=np.uint8), np.eye(4, dtype=np.uint8)]
)
def test_labels_that_are_neither_0_nor_1_of_each_class_are_refused(labels: np.ndarray) -> None:
    check_labels(arrays(np.eye(3, dtype=np.uint8)), "mine")
    with pytest.raises(UserError, match=r"the labels of mine are .+; of several an image they must be uint8 \[N, 3\]"):
        check_labels(arrays(labels), "mine")


COLOURS = {"blue": (30, 30, 220), "green": (30, 200, 30), "red": (220, 30, 30)}  # each in a corner of its own


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures to train on and 10 to evaluate on, each of up to three colours; a.csv, and b.csv with columns."""
    root, rng = tmp_path_factory.mktemp("several"), np.random.default_rng(0)
    lines, table = ["path,labels,split"], ["image,green,blue,split,red"]
    for number in range(34):
        pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        has = rng.random(3) < 0.5 if number % 8 else np.zeros(3, bool)
        for corner, (is_there, colour) in enumerate(zip(has, COLOURS.values(), strict=True)):
            if is_there:
                pixels[16 * (corner // 2) :][:16, 16 * (corner % 2) :][:, :16] = colour
        PIL.Image.fromarray(pixels).save(root / f"{number}.png")
        part = "train" if number < 24 else "val"
        names = [name for name, is_there in zip(COLOURS, has, strict=True) if is_there]
        lines.append(f"{number}.png,{';'.join(names[::-1])},{part}")
        blue, green, red = map(int, has)
        table.append(f"{number}.png,{green},{blue},{part},{red}.0")
    (root / "a.csv").write_text("\n".join(lines))
    (root / "b.csv").write_text("\n".join(table))
    return root


def config_of(table: Path, *overrides: str):
    """Six updates of eight pictures."""
    return parse_flags(
        [
            "--config=configs/folder.py", f"--config.model.arch={small.ARCH}", "--config.model.weights=",
            "--config.train.method=full",
            "--config.data.image_size=32", "--config.data.batch_size=8", "--config.train.steps=6",
            "--config.optim.warmup_epochs=0", "--config.data.augment=", "--config.checkpoint.every_steps=2",
            "--config.checkpoint.keep=9", f"--config.data.source=csv:{table}", "--config.train.loss=bce", *overrides,
        ], "", {},
    )[0]  # fmt: skip


SEMICOLON = "--config.data.label_delimiter=;"
HOW = (SEMICOLON, "--config.train.class_weights=balanced", "--config.checkpoint.best_metric=map")


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> jaxsft.Run:
    config, path = config_of(images / "a.csv", *HOW), tmp_path_factory.mktemp("run") / "run"
    workdir.check(path, config)
    training.train(config, path)
    return jaxsft.load(path)


def test_a_run_says_what_it_is_and_reports_each_class(run: jaxsft.Run) -> None:
    last = records(run.workdir)[-1]
    assert last["final"] and {"accuracy", "loss", "map", "f1_micro", "f1_macro"} <= last.keys()
    assert set(last["per_class"]) == set(COLOURS)
    assert ModelCard.load(run.workdir).multi_label and run.card.class_names == tuple(COLOURS)
    assert not ModelCard.of({k: v for k, v in json.loads((run.workdir / "model.json").read_text()).items()
                             if k != "multi_label"}).multi_label  # fmt: skip
    page = (run.workdir / "report.html").read_text()
    assert "Average precision and F1" in page and "images of 10" in page and 'id="confusions"' not in page
    values = {line["step"]: line["map"] for line in records(run.workdir) if line["split"] == "eval"}
    assert saved.read(run.workdir, "best").step == max(values, key=values.__getitem__)


def test_the_commands_say_what_the_run_does(run: jaxsft.Run, images: Path, tmp_path: Path) -> None:
    last, names = records(run.workdir)[-1], list(COLOURS)
    status, said, _ = hear_command(f"evaluate --workdir {run.workdir} --json @/e.json --predictions @/t.csv", tmp_path)
    assert status == 0 and "mAP" in said and "macro F1" in said and "micro " in said and "calibration: ECE" in said
    rows = (tmp_path / "t.csv").read_text().splitlines()
    assert rows[0] == "file,label,predicted,correct,loss," + ",".join(f"p_{name}" for name in names)
    assert len(rows) == last["count"] + 1 and sum(",True," in row for row in rows) == round(
        last["accuracy"] * last["count"]
    )
    found = json.loads((tmp_path / "e.json").read_text())
    assert {name: found[name] for name in last if name in found and name != "step"} == {
        name: value for name, value in last.items() if name in found and name != "step"
    }
    status, said, _ = hear_command(f"predict --workdir {run.workdir} {images} --topk 2 --json @/p.json", tmp_path)
    for line, entry in zip(said.splitlines(), json.loads((tmp_path / "p.json").read_text())["images"], strict=True):
        assert line.startswith(
            f"{entry['file']}: {', '.join(entry['labels']) or '-'} ({entry['classes'][0]['class']} 0."
        )
        assert len(entry["classes"]) == 2
        above = [one["class"] for one in entry["classes"] if one["probability"] > 0.5]
        assert sorted(above) == entry["labels"] or len(entry["labels"]) == 3
    assert said.count("\n") == 34
    rows = {line.partition(",")[0]: line for line in (images / "a.csv").read_text().splitlines()}
    pixels = preprocess(np.asarray(PIL.Image.open(images / "30.png"))[None], run.card.preprocessing)
    odds = np.exp(compiled(partial(run.model.apply, train=False))(run.variables, pixels)[0])
    (entry,) = run.predict(images / "30.png", topk=3)
    found = {one["class"]: one["probability"] for one in entry["classes"]}
    assert [*found] == sorted(names, key=lambda name: -found[name])
    np.testing.assert_allclose([found[name] for name in names], odds / (1 + odds), atol=1e-3)  # resized on the host
    wrong = run.mistakes(99)
    assert len(wrong) == last["count"] - round(last["accuracy"] * last["count"])
    for one in wrong:
        true = sorted(filter(None, rows[Path(one.file).name].split(",")[1].split(";")))
        assert (one.label if one.label != "-" else "") == ", ".join(true)
        assert one.label != one.predicted and one.probability > 0.5
    assert wrong == () or "taken for" in wrong._repr_html_()


def test_a_run_goes_on_where_it_was(run: jaxsft.Run, images: Path, tmp_path: Path) -> None:
    path = shutil.copytree(run.workdir, tmp_path / "run")
    for step in checkpoint.steps(path)[1:]:
        shutil.rmtree(path / "checkpoints" / str(step))
    log = path / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= 2))
    small.train_here(config_of(images / "a.csv", *HOW), path)
    assert small.outcome(path) == small.outcome(run.workdir)


def test_a_table_with_a_column_a_class_is_the_same(images: Path) -> None:
    both = [open_splits(config_of(images / table, *how)) for table, how in (("a.csv", HOW), ("b.csv", HOW[1:]))]
    for one, other in zip(*both, strict=True):
        assert (one.class_names, one.listing) == (other.class_names, other.listing)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_balanced_weights_are_those_of_the_images_trained_on(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    real = program.loss_of
    monkeypatch.setattr(program, "loss_of", lambda *arguments: told.append(arguments[-1]) or real(*arguments))
    made, _ = prepare.prepare(config_of(images / "a.csv", *HOW, "--config.data.fraction=0.5"))
    made.train_step.lower(made.state, made.train_loader.dataset, made.train_loader.blank())
    assert told == [balanced_weights(made.train_source.labels, 3)]
    assert len(made.train_source) < 24 and len(set(told[0])) > 1


# overrides -> what is said, of b.csv, which says by itself that there are several labels an image
WRONG = {
    "--config.train.loss=cross_entropy": "train.loss is 'cross_entropy', and csv:.+ has images with any number of lab",
    "--config.data.sampling=balanced": "data.sampling is 'balanced', and csv:.+ has images with any number of labels",
    "--config.model.num_classes=5": "model.num_classes is 5, and csv:.+ has images with .+; leave it out, for a head",
    "--config.checkpoint.best_metric=top5": "best_metric is 'top5', and csv:.+; take one of accuracy, loss, map, f1_m",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_does_not_go_with_several_labels_is_one_line(override: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=WRONG[override]):
        small.train_here(config_of(images / "b.csv", override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_and_data_of_another_kind_are_kept_apart(run: jaxsft.Run, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sample has one label an image, and the model was trained for images with any"):
        run.evaluate("sample")
    with pytest.raises(UserError, match="best_metric is 'map', and sample has one label an image; take one of"):
        small.run_here(tmp_path / "run", "--config.checkpoint.best_metric=map")
