"""What training starts from: ports in the cache, ports that are damaged, runs, and weights without a head."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from convert import names
from convert.__main__ import to_flax
from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.data.embedded import WEIGHTS as SAMPLE
from jaxsft.learn.state import TrainState
from jaxsft.models import weights
from jaxsft.models.initial import initial
from jaxsft.models.weights import ModelCard, Preprocessing, file_sha256
from jaxsft.run import pretrained
from jaxsft.run.checkpoint import Checkpoints
from jaxsft.run.pretrained import load_pretrained
from jaxsft.run.working_copy import WorkingCopy

ARCH = "resnet10_w16"
NAMES = tuple("abcdefg")


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Path:
    """The sample's weights, ported."""
    directory = tmp_path_factory.mktemp("ported") / "sample"
    to_flax(str(SAMPLE), ARCH, directory)
    return directory


@pytest.fixture
def conversions(port: Path, tmp_path: Path, monkeypatch) -> list[str]:
    """The weights that were converted, in this process; with a cache of this test's own."""
    asked: list[str] = []

    def run_module(module: str, command: str, source: str, *options: str) -> None:
        assert (module, command, options[0], options[2]) == ("convert", "to-flax", "--arch", "--out")
        asked.append(source)
        if source == str(SAMPLE):
            shutil.copytree(port, options[3])
        else:
            to_flax(source, options[1], Path(options[3]))

    monkeypatch.setattr(pretrained, "run_module", run_module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked


def ported(cache: Path) -> list[Path]:
    return sorted((cache / "jaxsft" / "ported").iterdir())


def assert_sample(variables) -> None:
    expected = safetensors.numpy.load_file(SAMPLE)
    found = names.to_torch(jax.device_get(variables), ARCH)
    assert {name: array.tobytes() for name, array in found.items()} == {n: a.tobytes() for n, a in expected.items()}


def test_ports_are_kept_and_directories_used_as_they_are(tmp_path: Path, conversions: list[str], monkeypatch) -> None:
    for source in ("sample", str(SAMPLE)):
        assert_sample(load_pretrained(source, ARCH)[0])
    assert conversions == [str(SAMPLE)]
    (cached,) = ported(tmp_path / "cache")
    monkeypatch.setenv("HOME", str(cached.parent))
    for place in (str(cached), f"~/{cached.name}"):
        assert_sample(load_pretrained(place, ARCH)[0])
    assert conversions == [str(SAMPLE)]
    with pytest.raises(UserError, match="holds a resnet10_w16, not a resnet18; set --config.model.arch=resnet10_w16"):
        load_pretrained(str(cached), "resnet18")
    with pytest.raises(UserError, match="no file"):
        load_pretrained(str(tmp_path / "absent.pth"), "resnet18")
    with pytest.raises(UserError, match="ftp:// is not known"):
        load_pretrained("ftp://bucket/port", "resnet18")
    assert ported(tmp_path / "cache") == [cached]


def damage_array(port: Path) -> None:
    """Cut every file of numbers short, as a full disk does."""
    for path in (port / "weights").rglob("*"):
        if path.is_file() and "d" in path.parent.name:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_numbers(port: Path) -> None:
    """Put a NaN into the head, as a conversion of an earlier version could."""
    variables, _ = weights.load(port)
    variables["params"]["fc"]["bias"] = variables["params"]["fc"]["bias"].at[0].set(np.nan)
    shutil.rmtree(port / "weights")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(port.resolve() / "weights", variables)


DAMAGE = {
    "no weights": lambda port: shutil.rmtree(port / "weights"),
    "no card": lambda port: (port / "model.json").unlink(),
    "half a card": lambda port: (port / "model.json").write_text((port / "model.json").read_text()[:50]),
    "half the numbers": damage_array,
    "NaN": spoil_numbers,
    "metadata that is a list": lambda port: (port / "weights" / "_METADATA").write_text("[]"),
    "weights that are a file": lambda port: (shutil.rmtree(port / "weights"), (port / "weights").write_text("")),
    "another head": lambda port: (port / "model.json").write_text(
        json.dumps({**json.loads((port / "model.json").read_text()), "num_classes": 9})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_port_of_the_cache_is_made_anew_and_one_of_the_users_refused(
    tmp_path: Path, port: Path, conversions: list[str], capsys, damage: str
) -> None:
    cached = tmp_path / "cache" / "jaxsft" / "ported" / f"{ARCH}-{file_sha256(SAMPLE)[:16]}"
    shutil.copytree(port, tmp_path / "mine")
    DAMAGE[damage](tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", cached)
    before = sorted(path for path in (tmp_path / "mine").rglob("*"))
    with pytest.raises(UserError) as error:
        load_pretrained(str(tmp_path / "mine"), ARCH)
    assert str(tmp_path / "mine") in str(error.value)
    assert len(" ".join(str(error.value).split())) < 500
    assert sorted(path for path in (tmp_path / "mine").rglob("*")) == before

    capsys.readouterr()
    assert_sample(load_pretrained("sample", ARCH)[0])
    assert capsys.readouterr().err.startswith(f"warning: {cached}" if "card" in damage else "warning: the weights in ")
    assert len(conversions) == 1
    assert ported(tmp_path / "cache") == [cached]
    assert_sample(weights.load(cached)[0])


def test_a_cache_that_cant_be_written_is_not_needed(
    tmp_path: Path, conversions: list[str], capsys, monkeypatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for count in (1, 2):
        assert_sample(load_pretrained("sample", ARCH)[0])
        assert len(conversions) == count
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: {tmp_path}/file/jaxsft/ported can't be written (")
    assert not any(temporary.iterdir())


def test_what_the_conversion_refuses_leaves_nothing(tmp_path: Path, conversions: list[str]) -> None:
    safetensors.numpy.save_file({"fc.bias": np.zeros(7, np.float32)}, tmp_path / "few.safetensors")
    with pytest.raises(UserError, match="do not fit"):
        load_pretrained(str(tmp_path / "few.safetensors"), ARCH)
    assert ported(tmp_path / "cache") == []


def train_config(**model: object) -> ConfigDict:
    config = config_module.default()
    config.model.update({"arch": ARCH, **model})
    config.data.preset = "weights"
    config.data.image_size = 48
    return config


@pytest.fixture(scope="module")
def run_directory(port: Path, tmp_path_factory) -> Path:
    """A run with checkpoints of steps 2 and 4: the sample's weights, its head doubled at step 4."""
    workdir = tmp_path_factory.mktemp("runs") / "tuned"
    variables, card = weights.load(port)
    workdir.mkdir()
    config = train_config(weights="sample")
    config.checkpoint.best_metric = "accuracy"
    (workdir / "config.json").write_text(config_module.to_json(config))
    dataclasses.replace(card, class_names=NAMES, preprocessing=Preprocessing(72, 64)).save(workdir)
    lines = [{"step": step, "split": "eval", "accuracy": 1 / step, "loss": 1.0} for step in (2, 4)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Checkpoints(WorkingCopy(workdir), keep=2) as checkpoints:
        for step in (2, 4):
            state = TrainState.create(variables, optax.sgd(0.1), with_average=False)
            params = {**state.params, "fc": jax.tree.map(lambda x: x * (step // 2), state.params["fc"])}
            checkpoints.save(state.replace(params=params), step, {})
            checkpoints.wait()
    return workdir


def test_a_run_is_gone_on_from(run_directory: Path, monkeypatch) -> None:
    bias = safetensors.numpy.load_file(SAMPLE)["fc.bias"]
    monkeypatch.setenv("HOME", str(run_directory.parent))
    for checkpoint, step, factor in (("last", 4, 2), ("best", 2, 1), ("2", 2, 1), ("4", 4, 2)):
        config = train_config(weights="~/tuned", checkpoint=checkpoint)
        _, variables, card, said, _ = initial(config, NAMES, load_pretrained)
        assert isinstance(variables["params"]["fc"]["bias"], jax.Array)
        np.testing.assert_array_equal(variables["params"]["fc"]["bias"], bias * factor)
        assert said == f"{ARCH} of tuned at step {step}, its head of 7 classes kept, for they are the data's"
        assert (card.source, card.sha256, card.class_names) == (f"tuned at step {step}", "", NAMES)
        assert card.preprocessing == Preprocessing(54, 48)  # the run's 72 of 64 px, in proportion
    _, variables, _, said, _ = initial(train_config(weights=str(run_directory)), NAMES[::-1], load_pretrained)
    assert "which are not the data's, replaced" in said
    assert not np.array_equal(variables["params"]["fc"]["bias"], bias * 2)


def test_a_run_that_does_not_fit_is_refused(run_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a resnet10_w16, not a resnet18"):
        initial(train_config(weights=str(run_directory), arch="resnet18"), NAMES, load_pretrained)
    with pytest.raises(UserError, match="has no intact checkpoint of step 3"):
        initial(train_config(weights=str(run_directory), checkpoint="3"), NAMES, load_pretrained)
    young = tmp_path / "young"
    young.mkdir()
    for name in ("config.json", "model.json"):
        shutil.copy(run_directory / name, young)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        initial(train_config(weights=str(young)), NAMES, load_pretrained)
    os.remove(young / "model.json")
    with pytest.raises(UserError, match="model.json can't be read"):
        initial(train_config(weights=str(young)), NAMES, load_pretrained)


def test_weights_without_a_head_are_given_one(tmp_path: Path, conversions: list[str]) -> None:
    body = {n: a for n, a in safetensors.numpy.load_file(SAMPLE).items() if not n.startswith("fc.")}
    safetensors.numpy.save_file(body, tmp_path / "body.safetensors")
    variables, card = load_pretrained(str(tmp_path / "body.safetensors"), ARCH)
    assert (card.num_classes, card.names) == (0, ())
    config = train_config(weights=str(tmp_path / "body.safetensors"))
    for head in ("auto", "replace"):
        config.model.head = head
        _, variables, card, said, _ = initial(config, NAMES, load_pretrained)
        assert said == f"{ARCH} of body.safetensors, which has no head, given one of 7"
        assert variables["params"]["fc"]["kernel"].shape == (128, 7)
        assert card.num_classes == 7
    sample = initial(train_config(weights="sample", head="replace"), NAMES, load_pretrained)[1]
    assert all(map(np.array_equal, jax.tree.leaves(variables), jax.tree.leaves(sample)))
    config.model.head = "keep"
    with pytest.raises(UserError, match="is 'keep' for 7 classes, and body.safetensors has no head"):
        initial(config, NAMES, load_pretrained)


def test_a_card_without_classes_has_no_head_in_its_shapes() -> None:
    assert "fc" not in weights.shapes(ModelCard(ARCH, 0))["params"]
    assert weights.shapes(ModelCard(ARCH, 5))["params"]["fc"]["kernel"].shape == (128, 5)
