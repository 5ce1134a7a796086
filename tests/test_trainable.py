"""One rule for every parameter: whether and from when it trains, at which rate, and how it decays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from flax import traverse_util

from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.learn import trainable
from jaxsft.learn.trainable import Rule
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.models.family import PARAMETER_KINDS, variable_shapes
from tests.commands import hear_command

SHAPES = variable_shapes(ARCHITECTURES["resnet10_w16"](num_classes=3))["params"]


# Of every kind one, by torchvision's names of ConvNeXt's, ViT's and Swin's.
KINDS = {
    "features.0/kernel": {"weight"},
    "features.0/bias": {"bias"},
    "norm/scale": {"norm"},
    "norm/bias": {"norm", "bias"},
    "features.1/layer_scale": {"layer_scale"},
    "class_token": {"class_token"},
    "encoder/pos_embedding": {"position_embedding"},
    "attn/relative_position_bias_table": {"bias_table"},
}


@pytest.mark.parametrize("kind", sorted(set(PARAMETER_KINDS.values())))
def test_decay_by_kind_is_torchvisions(kind: str) -> None:
    """By names, whatever the number of axes: the references' set_weight_decay takes a norm's bias for both kinds."""
    config = config_module.default()
    config.optim.no_decay = (kind,)
    for path, kinds in KINDS.items():
        assert trainable.decays(config, path, KINDS) == (kind not in kinds), path
    config.optim.no_decay = ()
    assert all(trainable.decays(config, path, KINDS) for path in [*KINDS, "an/unknown"])  # torch decays every parameter
    config.optim.decay_norm_and_bias = False
    spared = {path for path in KINDS if not trainable.decays(config, path, KINDS)}
    assert spared == {"features.0/bias", "norm/scale", "norm/bias"}
    with pytest.raises(UserError, match="of no known kind is an/unknown; its last part must be one"):
        trainable.decays(config, "an/unknown", KINDS)


def test_decay_of_a_network_is_torchvisions() -> None:
    """What --norm-weight-decay=0 spares in a ResNet-50: all that lies in modules that are norms."""
    with torch.device("meta"):
        modules = torchvision.models.resnet50().named_modules()
    norms = {name for name, module in modules if isinstance(module, torch.nn.BatchNorm2d)}
    params = variable_shapes(ARCHITECTURES["resnet50"]())["params"]
    flat = traverse_util.flatten_dict(params, sep="/")
    config = config_module.default()
    config.optim.no_decay = ("norm",)
    spared = {path.rpartition("/")[0] for path in flat if not trainable.decays(config, path, flat)}
    assert {family_of("resnet50").torch_name(module) for module in spared} == norms


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "freeze", ("layer9",), "'layer9' matches no parameter"),
        ("optim", "lr_multipliers", (("head", 2.0),), "'head' matches no parameter"),
        ("model", "freeze", (".",), "covers every parameter"),
        (
            "model",
            "unfreeze",
            (("^fc", 1.0),),
            "unfreeze: '\\^fc' matches no frozen parameter; paths look like bn1/bias",
        ),
    ],
)
def test_patterns_that_can_not_be_meant(section: str, key: str, value: object, message: str) -> None:
    config = config_module.default()
    config.model.freeze = ("^bn1",)
    config[section][key] = value
    with pytest.raises(UserError, match=message):
        trainable.rules(config, SHAPES)


def config_of(**settings: Any):
    config = config_module.default()
    for key, value in settings.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


GRADUAL = {"model__freeze": ("^(?!fc)",), "model__unfreeze": (("^layer4", 1.0), ("^layer[34]", 2.5))}
NEAR = {"optim__l2_sp": 0.1, "optim__weight_decay": 0.5, "optim__no_decay": ("norm",)}
MUON = {"optim__name": "muon"}

# settings, path, what its rule says
RULES: tuple[tuple[dict[str, Any], str, dict[str, Any]], ...] = (
    ({}, "fc/kernel", {"shape": (128, 3), "start": 0.0, "factor": 1.0, "decay": 0.0, "adapts": False}),
    (GRADUAL, "fc/bias", {"start": 0.0}),
    (GRADUAL, "layer4_0/conv1/kernel", {"start": 1.0}),  # the first pair whose pattern is found
    (GRADUAL, "layer3_0/conv1/kernel", {"start": 2.5}),
    (GRADUAL, "layer2_0/conv1/kernel", {"start": None}),
    (NEAR, "conv1/kernel", {"decay": 0.1, "to_start": True}),
    (NEAR, "bn1/bias", {"decay": 0.0}),  # spared, as of weight decay
    (NEAR, "fc/kernel", {"decay": 0.5, "to_start": False}),  # fresh
    ({**NEAR, "model__weights": ""}, "conv1/kernel", {"decay": 0.5, "to_start": False}),
    (MUON, "conv1/kernel", {"adapts": True}),
    (MUON, "fc/kernel", {"adapts": False}),
    (MUON, "bn1/scale", {"adapts": False}),
    ({"optim__name": "lars"}, "fc/kernel", {"adapts": True}),
    ({"optim__name": "lamb"}, "fc/bias", {"adapts": False}),
)


@pytest.mark.parametrize(("settings", "path", "expected"), RULES)
def test_every_parameter_has_one_rule(settings: dict[str, Any], path: str, expected: dict[str, Any]) -> None:
    found = trainable.rules(config_of(**settings), SHAPES, fresh=("fc/kernel", "fc/bias"))
    assert found.keys() == traverse_util.flatten_dict(SHAPES, sep="/").keys()
    assert {name: getattr(found[path], name) for name in expected} == expected


def test_a_parameter_of_no_known_kind_is_named() -> None:
    odd = {"fc": {"kernel": np.zeros((2, 2)), "gain": np.zeros(2)}}
    assert trainable.rules(config_of(optim__weight_decay=0.1), odd)["fc/gain"].decay == 0.1  # nothing asks for a kind
    for settings in (MUON, {"optim__name": "lars"}, {"optim__name": "lamb"}, {"optim__no_decay": ("norm",)}):
        with pytest.raises(UserError, match="of no known kind is fc/gain; its last part must be one of kernel, "):
            trainable.rules(config_of(**settings), odd)


def test_phases_begin_at_whole_updates() -> None:
    found = trainable.rules(config_of(**GRADUAL), SHAPES)
    assert trainable.phases(found, 5, 100) == [(0, 0.0), (5, 1.0), (12, 2.5)]
    assert trainable.phases(trainable.rules(config_of(), SHAPES), 5, 100) == [(0, 0.0)]
    one = Rule((1,), 0.1, 1.0, 0.0)
    assert trainable.phases({"a": one, "b": one._replace(start=0.2)}, 10, 100) == [(0, 0.0), (1, 0.1), (2, 0.2)]
    # Of two that begin with the same update there is one phase, and what begins before the first update is there.
    assert trainable.phases({"a": one, "b": one._replace(start=0.2)}, 2, 100) == [(0, 0.2)]
    for total in (12, 9):
        with pytest.raises(
            UserError, match=r"unfreeze begins at epoch 2.5; it must be earlier, for the run is .* long"
        ):
            trainable.phases(found, 5, total)


def frozen_norms(epoch: float, **settings: Any) -> set[str]:
    """Which modules of the network a batch norm's pattern is found in."""
    config = config_of(**settings)
    patterns = trainable.frozen_modules(config, trainable.rules(config, SHAPES), epoch)
    modules = {path.rpartition("/")[0] for path in traverse_util.flatten_dict(SHAPES, sep="/")}
    return {module for module in modules if trainable.is_frozen(tuple(module.split("/")), patterns) and "bn" in module}


def test_norms_stand_still_until_they_train() -> None:
    def of(*stages: str) -> set[str]:
        return {name for name in frozen_norms(0.0, model__freeze=("^(?!fc)",)) if name.startswith(stages)}

    everywhere = of("")
    assert len(everywhere) == 1 + 4 * 2 + 3
    assert frozen_norms(0.0, **GRADUAL) == everywhere
    assert frozen_norms(1.0, **GRADUAL) == everywhere - of("layer4")
    assert frozen_norms(2.5, **GRADUAL) == everywhere - of("layer4", "layer3")
    # A norm of which only the bias trains is still frozen, and one whose path model.freeze does not find never was.
    freeze = ("^bn1", "layer1_0/bn1/scale")
    unfreeze = (("bn1/bias", 1.0), ("layer1_0/bn1", 1.0))
    assert frozen_norms(2.0, model__freeze=freeze, model__unfreeze=unfreeze) == {"bn1"}
    # The end of a name is no other's: layer1_0/bn1 is not bn1.
    assert frozen_norms(0.0, model__freeze=("^bn1",), model__unfreeze=(("^bn1/bias", 1.0),)) == {"bn1"}


def test_the_table_says_what_the_rules_do() -> None:
    config = config_of(**GRADUAL, **NEAR, optim__lr_multipliers=(("^layer4", 0.25),))
    found = trainable.table(trainable.rules(config, SHAPES, fresh=("fc/kernel", "fc/bias")), 0.02)
    rows = {row[0]: row[1:] for row in found}
    assert all(len(row) == len(trainable.COLUMNS) for row in found)
    assert rows["layer4_0/conv1/kernel"] == ("3x3x64x128", "1", "0.005", "0.1 to its start")
    assert rows["layer3_0/bn1/scale"] == ("64", "2.5", "0.02", "0")
    assert rows["layer1_0/conv1/kernel"] == ("3x3x16x16", "never", "-", "-")
    assert rows["fc/kernel"] == ("128x3", "0", "0.02", "0.5")


def test_the_command_prints_it_and_touches_nothing(tmp_path: Path) -> None:
    """Neither weights nor data are there."""
    command = (
        "train --config configs/cifar10.py:sample --workdir @/run --print-parameters --config.model.weights=@/none.pth"
        " --config.data.source=folder:@/none --config.optim.lr=0.02 --config.data.batch_size=64"
        " --config.optim.lr_scaling=linear --config.model.freeze=^conv1 "
    )
    for classes, kernel in ((None, "128x?"), (7, "128x7")):
        status, printed, said = hear_command(f"{command} --config.model.num_classes={classes}", tmp_path)
        assert status == 0, said
        assert not list(tmp_path.iterdir())
        first, *rows = printed.splitlines()
        assert first == "parameter                        shape        trains from epoch  rate   decay"
        assert f"fc/kernel                        {kernel:13}0                  0.005  0.0005" in rows
        assert "conv1/kernel                     7x7x3x16     never              -      -" in rows
        assert len(rows) == len(traverse_util.flatten_dict(SHAPES, sep="/"))


# settings that are fine by themselves, and what is said of them together
WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    (
        {"optim__name": "lars", "optim__nesterov": True, "optim__momentum": 0.0},
        "config.optim.nesterov needs a momentum",
    ),
    ({"optim__betas": (0.9, 0.99)}, r"config.optim.betas is \(0.9, 0.99\), and sgd has none; leave them out"),
    ({"optim__name": "lion", "optim__eps": 1e-5}, "config.optim.eps is 1e-05, and lion has none; leave it out"),
    (
        {"optim__l2_sp": 0.1, "model__weights": ""},
        "config.optim.l2_sp without config.model.weights has nothing to stay",
    ),
    ({"model__unfreeze": (("a", 1.0),)}, "config.model.unfreeze without config.model.freeze has nothing that could"),
    (
        {"model__freeze": ("a",), "model__unfreeze": (("a", 1.0), ("b", 10.0))},
        r"config.model.unfreeze is .*, and the run ends at epoch 10; begin earlier, or train longer",
    ),
    ({"model__freeze": ("a",), "model__unfreeze": (("a", 0.0),)}, "it must be a tuple of pairs .*, epoch above 0"),
    ({"optim__betas": (0.9,)}, "config.optim.betas is .0.9,.; it must be no or two numbers, 0 to below 1"),
    ({"optim__schedule": "onecycle", "optim__warmup_epochs": 1.0}, "'onecycle', which has a warm-up of its own; set"),
    ({"optim__schedule": "onecycle", "optim__warmup_steps": 1}, "'onecycle', which has a warm-up of its own; set"),
    ({"optim__schedule": "onecycle", "optim__schedule_by": "epoch"}, "'onecycle', which changes the rate at every up"),
    (
        {"optim__schedule_by": "epoch", "optim__warmup_steps": 9},
        "warmup_steps is 9 and config.optim.schedule_by is 'ep",
    ),
    (
        {"optim__schedule_by": "epoch", "optim__warmup_epochs": 0.5},
        "warm up for whole epochs, or set --config.optim.sc",
    ),
    ({"optim__warmup_epochs": 10.0}, "config.optim.warmup_epochs is not shorter than config.train.epochs; warm up for"),
    ({"optim__warmup_steps": 9, "train__steps": 9}, "optim.warmup_steps 9 is not less than config.train.steps 9; warm"),
)


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    config = config_of(**settings)
    with pytest.raises(UserError, match=message):
        config_module.check(config)


def test_settings_that_do() -> None:
    config = config_module.default()
    config.optim.update({"schedule": "onecycle", "warmup_steps": 0, "warmup_epochs": 99.0, "name": "muon"})
    config.optim.update({"betas": (0.9, 0.95), "eps": 1e-6, "l2_sp": 0.1})
    config.model.update({"freeze": ("a",), "unfreeze": (("a", 0.5),)})
    config_module.check(config)
