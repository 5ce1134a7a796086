"""A head whose classes are changed by name: which rows stay, and what a run makes of data that lack some of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.data.base import Arrays
from jaxsft.data.sources import SOURCES, open_splits
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.family import init_variables
from jaxsft.models.initial import init_head, initial
from jaxsft.models.rows import names_of, rows_of, with_rows
from jaxsft.models.weights import ModelCard, load, save
from jaxsft.run.evaluation import evaluate_run, open_examples
from jaxsft.run.pretrained import load_pretrained
from jaxsft.run.saved import load_run
from tests import small

OLD = ("cat", "dog", "eel", "fox")
# model.classes -> the row of each, what is said
CASES: tuple[tuple[tuple[str, ...], list[int], str], ...] = (
    (OLD, [0, 1, 2, 3], "head: 4 rows kept"),
    (OLD[::-1], [3, 2, 1, 0], "head: 4 rows kept"),
    (("fox", "frog", "cat"), [3, -1, 0], "head: 2 rows kept, 1 new (frog), 2 dropped (dog, eel)"),
    (("cat=kitten", "dog"), [0, 1], "head: 2 rows kept, 2 dropped (eel, fox), 1 renamed (cat to kitten)"),
    (("cat=dog", "dog=cat"), [0, 1], "head: 2 rows kept, 2 dropped (eel, fox), 2 renamed (cat to dog, dog to cat)"),
    (("cat=dog", "eel"), [0, 2], "head: 2 rows kept, 2 dropped (dog, fox), 1 renamed (cat to dog)"),
    (("ape", "bat"), [-1, -1], "head: 0 rows kept, 2 new (ape, bat), 4 dropped (cat, dog, eel, fox)"),
)


@pytest.mark.parametrize(("entries", "rows", "said"), CASES)
def test_rows_go_with_their_names(entries: tuple[str, ...], rows: list[int], said: str) -> None:
    found, line = rows_of(entries, OLD, "run at step 4")
    assert (found, line) == (rows, said)
    old = {"kernel": np.arange(8.0).reshape(2, 4), "bias": np.arange(4.0)}
    fresh = {"kernel": -np.ones((2, len(found))), "bias": -np.ones(len(found))}
    new = with_rows(fresh, old, found)
    for place, row in enumerate(found):
        for name in old:
            expected = fresh[name][..., place] if row < 0 else old[name][..., row]
            np.testing.assert_array_equal(new[name][..., place], expected)


# model.classes (or other settings) that can't be
WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"model.classes": ("cat",)}, "config.model.classes is ('cat',); it must be a tuple of two names or more"),
    ({"model.classes": ("cat", "cat")}, "config.model.classes is ('cat', 'cat'); it must be a tuple"),
    ({"model.classes": ("cat", "dog=cat")}, "config.model.classes is ('cat', 'dog=cat'); it must be"),
    ({"model.classes": ("cat=a", "cat=b")}, "config.model.classes is ('cat=a', 'cat=b'); it must be"),
    ({"model.classes": ("cat", "=b")}, "config.model.classes is ('cat', '=b'); it must be"),
    ({"model.classes": ("cat", "")}, "config.model.classes is ('cat', ''); it must be"),
    ({"model.classes": (1, 2)}, "config.model.classes is (1, 2); it must be"),
    ({"model.classes": OLD, "model.num_classes": 3},
     "config.model.classes has 4 names, and config.model.num_classes is 3; leave out num_classes"),
    ({"model.classes": OLD, "model.head": "replace"},
     "config.model.classes decides on the head by name, and config.model.head is 'replace'; leave out one of them"),
    ({"model.classes": OLD, "model.weights": ""},
     "config.model.classes without config.model.weights has no head to change; name weights whose classes have names"),
    ({"train.method": "probe", "model.weights": ""},
     "config.train.method='probe' without config.model.weights probes random features; name weights"),
    ({"train.method": "lp-ft", "model.weights": ""},
     "config.train.method='lp-ft' without config.model.weights probes random features; name weights"),
    ({"train.method": "probe", "train.mixup": 0.2},
     "config.train.mixup and cutmix mix images, and a probe that keeps features sees none; leave them out, or"),
    ({"train.method": "lora"}, "config.train.method is 'lora'; it must be 'full', 'probe' or 'lp-ft'"),
    ({"train.probe_epochs": 0.0}, "config.train.probe_epochs is 0.0; it must be above 0"),
    ({"train.probe_lr": -1.0}, "config.train.probe_lr is -1.0; it must be above 0"),
)  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), WRONG)
def test_what_does_not_go_together(settings: dict[str, Any], said: str) -> None:
    config = config_module.default()
    for key, value in settings.items():
        config_module.put(config, key, value)
    with pytest.raises(UserError) as error:
        config_module.check(config)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_what_goes_together() -> None:
    for settings in ({"train.method": "probe", "train.mixup": 0.2, "train.keep_features": False},
                     {"train.method": "lp-ft", "train.mixup": 0.2}, {"train.mixup": 0.2},
                     {"model.classes": OLD, "model.num_classes": 4}):  # fmt: skip
        config = config_module.default()
        for key, value in settings.items():
            config_module.put(config, key, value)
        config_module.check(config)


def test_weights_that_have_no_such_class() -> None:
    with pytest.raises(
        UserError, match=r"has 'dgo=hound', and run at step 4 knows no class 'dgo'; did you mean 'dog'\?"
    ):
        rows_of(("cat", "dgo=hound"), OLD, "run at step 4")
    with pytest.raises(UserError, match=r"goes by names, and the classes of a\.pth have none; leave it out, or give"):
        rows_of(("cat", "dog"), None, "a.pth")


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Path:
    """The small network with a head of OLD."""
    path = tmp_path_factory.mktemp("port") / "port"
    save(path, init_variables(ARCHITECTURES[small.ARCH](num_classes=4), 3, 32), ModelCard(small.ARCH, 4, OLD))
    return path


CHANGED = ("frog", "fox", "cat=kitten", "owl")


def config_of(port: Path, *more: str) -> Any:
    return small.config(f"--config.model.weights={port}", f"--config.model.classes={','.join(CHANGED)}", *more)


def test_kept_rows_are_bit_equal_and_new_ones_as_of_a_fresh_head(port: Path) -> None:
    model, variables, card, said, own = initial(config_of(port), names_of(CHANGED), load_pretrained)
    assert said.endswith("head: 2 rows kept, 2 new (frog, owl), 2 dropped (dog, eel), 1 renamed (cat to kitten)")
    assert (card.num_classes, card.class_names) == (4, ("frog", "fox", "kitten", "owl"))
    assert own == ("fc/bias", "fc/kernel")
    before, after = load(port)[0], variables
    for leaf in ("kernel", "bias"):
        old, new = (np.asarray(values["params"]["fc"][leaf]) for values in (before, after))
        np.testing.assert_array_equal(new[..., [1, 2]], old[..., [3, 0]])
        fresh = np.asarray(init_head(model, before["params"]["fc"], 0)[leaf])
        np.testing.assert_array_equal(new[..., [0, 3]], fresh[..., [0, 3]])
        assert 0 < np.abs(new[..., [0, 3]]).max() <= 16**-0.5
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    logits = [jax.jit(lambda v, x: model.apply(v, x, train=False))(values, x) for values in (before, after)]
    np.testing.assert_array_equal(logits[1][:, [1, 2]], logits[0][:, [3, 0]])


def images(names: tuple[str, ...], labels: list[int]) -> Arrays:
    rng = np.random.default_rng(len(labels))
    return Arrays(rng.integers(0, 256, (len(labels), 32, 32, 3), np.uint8), np.array(labels, np.int32), names)


def held(monkeypatch: pytest.MonkeyPatch, train: Arrays, evaluated: Arrays) -> tuple[str, ...]:
    """The overrides of a run on these."""
    splits = {"train": train, "val": evaluated}
    opener = lambda name, split, options: dataclasses.replace(splits[split], split=split)
    monkeypatch.setitem(SOURCES, "held", opener)
    return ("--config.data.source=held:", "--config.data.train_split=train", "--config.data.eval_split=val")


def test_labels_go_to_the_outputs_of_their_names(port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, evaluated = images(("cat", "kitten", "owl"), [2, 1, 1, 2]), images(("owl", "kitten"), [0, 1, 0])
    found = open_splits(config_of(port, *held(monkeypatch, train, evaluated)))
    assert [source.labels.tolist() for source in found] == [[3, 2, 2, 3], [3, 2, 3]]
    assert {source.class_names for source in found} == {("frog", "fox", "kitten", "owl")}
    wrong = images(("cat", "kitten", "pig"), [2, 1, 0, 2])
    said = r"the train split of held: has the classes 'cat', 'pig', which config.model.classes lacks; leave them out or"
    with pytest.raises(UserError, match=said):
        open_splits(config_of(port, *held(monkeypatch, wrong, evaluated)))


def test_a_run_on_data_that_lack_some_of_the_classes(port: Path, tmp_path: Path, monkeypatch) -> None:
    """Its outputs are those that were named, and its card says so: what comes after goes by them."""
    train, evaluated = images(("kitten", "owl"), [0, 1] * 16), images(("kitten", "owl"), [0, 1] * 5)
    options = held(monkeypatch, train, evaluated)
    small.train_here(
        config_of(port, *options, "--config.train.method=probe", "--config.train.epochs=2"), tmp_path / "run"
    )
    run = load_run(tmp_path / "run")
    assert run.card.class_names == ("frog", "fox", "kitten", "owl")
    result = evaluate_run(run, open_examples(run))
    assert result.classes.support.tolist() == [0, 0, 5, 5]
    config = small.config(f"--config.model.weights={tmp_path / 'run'}", "--config.model.classes=owl=barn owl,kitten")
    _, _, card, said, _ = initial(config, ("barn owl", "kitten"), load_pretrained)
    assert card.class_names == ("barn owl", "kitten")
    changes = "2 rows kept, 2 dropped (frog, fox), 1 renamed (owl to barn owl)"
    assert said == f"one_block of run at step 4, head: {changes}"
