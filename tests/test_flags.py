"""The command line of a run: every key, every way to write a value, config files, and what --help says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from jaxsft import config as config_module
from jaxsft import flags, recipes
from jaxsft.cli import UserError
from jaxsft.data import show
from jaxsft.keys import KEYS
from jaxsft.run import saved, workdir
from tests.conftest import ROOT

SAMPLE = f"--config={ROOT}/configs/cifar10.py:sample"
DEFAULTS = config_module.flatten(config_module.default().to_dict())


def parsed(*arguments: str) -> ConfigDict:
    return flags.parse_flags([SAMPLE, *arguments], "", {})[0]


def test_help_lists_every_key_and_what_it_may_be(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["show", "--help"])
    with pytest.raises(SystemExit) as end:
        show.main()
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"  --config.{key}={flags.as_text(value)}" in said for key, value in DEFAULTS.items())
    assert "--out" in said
    assert max(map(len, said.splitlines())) <= 120
    words = " ".join(said.split())
    for key in KEYS:
        option = f"--config.{key.name}={flags.as_text(key.default)}"
        assert f"{option} {key.meaning} [{config_module.wanted(key.name)}" in words
        assert key.allowed.text in words
    assert "what changes training images, in this order [a tuple of names: random_resized_crop, pad_crop," in words
    assert "small one for 64 px [a name: resnet18, resnet34," in words
    lines = said.splitlines()
    assert (
        f"{'  --config.model.head_init=torch':42}of a fresh head; 'torch': U(+-1/sqrt(fan_in)) ['torch' or 'zeros']"
        in lines
    )
    assert " " * 42 + "['bilinear' or 'bicubic']" in lines  # not beside the meaning, where it would be broken


@pytest.mark.parametrize("key", DEFAULTS)
def test_what_help_shows_is_what_is_read(key: str) -> None:
    value = flags.read(key, flags.as_text(DEFAULTS[key]))
    assert value == DEFAULTS[key]
    assert type(value) is type(DEFAULTS[key])


# (key, text, value)
VALUES: tuple[tuple[str, str, Any], ...] = (
    ("data.workers", "None", None),
    ("data.workers", "none", None),
    ("data.workers", "4", 4),
    ("train.steps", "1e2", 100),
    ("data.batch_size", "1e2", 100),
    ("data.batch_size", "100.0", 100),
    ("seed", "9007199254740993", 9007199254740993),  # no float holds it
    ("seed", "0", 0),
    ("optim.lr", "1e-2", 0.01),
    ("optim.lr", "1", 1.0),
    ("train.epochs", "1e2", 100.0),
    *(("optim.nesterov", text, True) for text in ("true", "True", "yes", "on", "1", "YES")),
    *(("optim.nesterov", text, False) for text in ("false", "False", "no", "off", "0", "Off")),
    ("data.augment", "pad_crop,flip", ("pad_crop", "flip")),
    ("data.augment", "pad_crop, flip", ("pad_crop", "flip")),
    ("data.augment", "flip", ("flip",)),
    ("data.augment", "", ()),
    ("data.augment", "()", ()),
    ("data.augment", "('pad_crop', 'flip')", ("pad_crop", "flip")),
    ("data.augment", "['flip']", ("flip",)),
    ("data.augment", "(pad_crop,flip)", ("pad_crop", "flip")),  # after a shell has taken the quotes
    ("data.augment", "'flip'", ("flip",)),
    ("data.mean", "0.5,0.5,0.5", (0.5, 0.5, 0.5)),
    ("data.mean", "(0.5, 0.5, 0.5)", (0.5, 0.5, 0.5)),
    ("data.rand_augment", "2,9", (2, 9)),
    ("train.class_weights", "2", (2,)),
    ("model.freeze", "layer[12]_.*,conv1", ("layer[12]_.*", "conv1")),
    ("model.freeze", r"layer1\..", (r"layer1\..",)),
    ("model.freeze", "(layer1|layer2)", ("(layer1|layer2)",)),
    ("optim.lr_multipliers", "(('fc', 10.0),)", (("fc", 10.0),)),
    ("optim.lr_multipliers", "[['fc', 10.0]]", (("fc", 10.0),)),
    ("model.weights", "", ""),
    ("data.train_split", "train[:90%]", "train[:90%]"),
    ("data.interpolation", "bicubic", "bicubic"),
    ("optim.no_decay", "class_token,position_embedding", ("class_token", "position_embedding")),
)


@pytest.mark.parametrize(("key", "text", "value"), VALUES)
def test_values(key: str, text: str, value: Any) -> None:
    found = config_module.get(parsed(f"--config.{key}={text}"), key)
    assert found == value
    assert type(found) is type(value)


def test_ways_to_write_an_option() -> None:
    config, values, config_flag = flags.parse_flags(
        ["-config.seed", "3", "--config.optim.lr", "-1", "--noconfig.optim.nesterov", "--config.data.check_overlap",
         "--workdir", "a", "--workdir=b=c", "--config.seed=4", "--config.model.freeze=conv1",
         "--config.model.freeze=layer1,layer2", SAMPLE],
        "",
        {"workdir": "", "other": ""},
    )  # fmt: skip
    assert (config.seed, config.optim.lr, config.optim.nesterov, config.data.check_overlap) == (4, -1.0, False, True)
    assert config.model.freeze == ("conv1", "layer1", "layer2")
    assert values == {"workdir": "b=c", "other": ""}
    assert f"--config={config_flag}" == SAMPLE
    assert config.is_locked
    assert recipes.run_name(config_flag) == "cifar10-sample"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("--lr", "--config.optim.lr"),
        ("--config.lr", "--config.optim.lr"),
        ("--config.learning_rate", "--config.optim.lr"),
        ("--config.optim.lrr", "--config.optim.lr"),
        ("--config.train.lr", "--config.optim.lr"),
        ("--learning-rate", "--config.optim.lr"),
        ("--batch", "--config.data.batch_size"),
        ("--bs", "--config.data.batch_size"),
        ("--epochs", "--config.train.epochs"),
        ("--wd", "--config.optim.weight_decay"),
        ("--num_workers", "--config.data.workers"),
        ("--img-size", "--config.data.image_size"),
        ("--image-size", "--config.data.image_size"),
        ("--noconfig.nesterov", "--config.optim.nesterov"),
        ("--batch-norm", "--config.model.batch_norm or --config.parallel.batch_norm"),
        ("--out", "--workdir"),
        ("--output_dir", "--workdir"),
        ("--num_processes", "--num-processes"),
        ("--confg", "--config"),
        ("--gpus", ""),
    ],
)
def test_did_you_mean(name: str, meant: str) -> None:
    assert flags.suggestion(name, {"workdir": "", "num-processes": ""}) == meant


def test_other_names_are_of_keys_and_options_that_exist() -> None:
    assert flags.OTHER_NAMES.keys() - DEFAULTS.keys() == {"workdir", "num-processes", "process-id"}
    leaves = {key.rpartition(".")[2] for key in DEFAULTS}
    others = " ".join(flags.OTHER_NAMES.values()).split()
    assert len(set(others)) == len(others)
    assert not leaves & set(others)


def test_a_config_file_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.py").write_text(
        "import dataclasses\nfrom jaxsft.config import default\n\n\n"
        "@dataclasses.dataclass\nclass Own:\n    seed: int = 7\n\n\n"
        "def get_config(variant='none'):\n    config = default()\n    config.seed = Own().seed\n"
        "    config.data.train_split = variant\n    return config\n"
    )
    for config_flag, variant, name in (("~/own.py", "none", "own"), ("~/own.py:v:w", "v:w", "own-v:w")):
        config, _, said = flags.parse_flags([f"--config={config_flag}"], "", {})
        assert (config.seed, config.data.train_split, said) == (7, variant, config_flag)
        assert recipes.run_name(config_flag) == name
    assert [path.name for path in tmp_path.iterdir()] == ["own.py"]  # nothing that Python made of it


def test_keys_of_a_config() -> None:
    config = config_module.default()
    config.optim.lr = 1
    config.data.workers = 2
    config_module.check_keys(config)
    config.optim.learning_rate = 0.1
    with pytest.raises(UserError, match=r"the config has a key 'optim.learning_rate' that means nothing; .*"):
        config_module.check(config)
    text = config_module.to_json(config_module.default()).replace('"lr"', '"learning_rate"')
    with pytest.raises(KeyError):
        config_module.from_json(text)


def test_a_resumed_run_may_be_evaluated_at_other_times(tmp_path: Path) -> None:
    config = config_module.default()
    (tmp_path / saved.CONFIG).write_text(config_module.to_json(config))
    config.eval.every_epochs = 0.5
    workdir.check_config(tmp_path, config)
    config.data.eval_split = "test"
    with pytest.raises(UserError, match=r"data.eval_split"):
        workdir.check_config(tmp_path, config)


def test_recipes_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this package is installed and no configs/ is near; a file of the user's own comes first."""
    there = recipes.load("configs/cifar10.py:sample")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    for name in ("cifar10:sample", "cifar10.py:sample", "configs/cifar10.py:sample"):
        assert recipes.load(name) == there
    with pytest.raises(UserError, match="there is no config file other/cifar10.py"):
        recipes.load("other/cifar10.py:sample")
    (tmp_path / "cifar10.py").write_text(
        "from jaxsft.config import default\n"
        "def get_config():\n    config = default()\n    config.seed = 9\n    return config\n"
    )
    assert recipes.load("cifar10.py").seed == 9
    assert recipes.load("configs/cifar10.py").seed == 0
