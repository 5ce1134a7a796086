"""`python -m convert`: a really trained checkpoint goes to Flax and agrees with torchvision."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from convert.__main__ import to_flax, torchvision_logits, verify
from jaxsft.cli import UserError
from jaxsft.models import weights
from jaxsft.models.families import ARCHITECTURES


@pytest.fixture(scope="module")
def ported(cifar7: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ported") / "resnet18"
    to_flax(str(cifar7), "resnet18", directory)
    return directory


def test_card_says_where_the_weights_came_from(ported: Path, cifar7: Path) -> None:
    card = json.loads((ported / "model.json").read_text())
    assert card["arch"] == "resnet18"
    assert card["num_classes"] == 7
    assert card["source"] == cifar7.name
    assert card["sha256"] == weights.file_sha256(cifar7)


def test_verify_agrees_in_evaluation_and_training(ported: Path, cifar7: Path, capsys) -> None:
    assert verify(ported, str(cifar7), image_size=64) == 0
    said = capsys.readouterr().out
    assert said.count("ok") == 2
    assert "differing: none" in said


def test_verify_notices_a_changed_tensor(ported: Path, cifar7: Path, tmp_path: Path, capsys) -> None:
    changed = torch.load(cifar7, weights_only=True)
    changed["layer3.1.bn2.running_var"] *= 1.01
    torch.save(changed, tmp_path / "changed.pth")
    assert verify(ported, str(tmp_path / "changed.pth"), image_size=64) == 1
    said = capsys.readouterr().out
    assert "differing: layer3.1.bn2.running_var" in said
    assert "FAIL" in said


def test_logits_in_float64_agree_to_rounding(ported: Path, cifar7: Path) -> None:
    # float64 leaves 1e-16 a rounding: what a wrong padding or stride would change is 1e-1.
    variables, card = weights.load(ported)
    tensors = {k: v.numpy() for k, v in torch.load(cifar7, weights_only=True).items()}
    wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in tensors.items()}
    images = np.random.default_rng(1).standard_normal((2, 65, 47, 3))
    torch.set_default_dtype(torch.float64)
    try:
        expected = torchvision_logits(card, wide, images, train=False)
    finally:
        torch.set_default_dtype(torch.float32)
    with jax.enable_x64(True):
        model = ARCHITECTURES["resnet18"](num_classes=7, dtype=np.float64, param_dtype=np.float64)
        wide_variables = jax.tree.map(
            lambda x: np.asarray(x, np.float64) if x.dtype == np.float32 else np.asarray(x), variables
        )
        logits = np.asarray(jax.jit(partial(model.apply, train=False))(wide_variables, images))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_a_failed_port_leaves_nothing(cifar7: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not fit resnet34"):
        to_flax(str(cifar7), "resnet34", tmp_path / "out" / "dir")
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_not_overwritten(ported: Path, cifar7: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        to_flax(str(cifar7), "resnet18", ported)


DAMAGE = {
    "not JSON": lambda card: "{",
    "a list": lambda card: "[]",
    "another arch": lambda card: json.dumps({**card, "arch": "resnet81"}),
    "fewer classes than none": lambda card: json.dumps({**card, "num_classes": -1}),
    "classes that are true": lambda card: json.dumps({**card, "num_classes": True}),
    "no number of classes": lambda card: json.dumps({**card, "num_classes": 7.0}),
    "a number of 5,000 digits": lambda card: json.dumps(card).replace(
        '"num_classes": 7', '"num_classes": 1' + "0" * 5000
    ),
    "a number of 400 digits": lambda card: json.dumps({**card, "num_classes": 10**400}),
    "an arch that is a list": lambda card: json.dumps({**card, "arch": ["resnet18"]}),
    "names that are numbers": lambda card: json.dumps({**card, "class_names": [1, 2, 3, 4, 5, 6, 7]}),
    "names that are one": lambda card: json.dumps({**card, "class_names": "abcdefg"}),
    "names in an object": lambda card: json.dumps({**card, "class_names": dict.fromkeys("abcdefg")}),
    "a source that is a number": lambda card: json.dumps({**card, "source": 1}),
    "a hash that is nothing": lambda card: json.dumps({**card, "sha256": None}),
    "an unknown order": lambda card: json.dumps({**card, "class_order": "random"}),
    "an order that is a list": lambda card: json.dumps({**card, "class_order": ["text"]}),
    "no preprocessing": lambda card: json.dumps({**card, "preprocessing": None}),
    "preprocessing that is a list": lambda card: json.dumps({**card, "preprocessing": [256, 224]}),
    "deep nesting": lambda card: json.dumps(card).replace('"resnet18"', "[" * 100_000 + "]" * 100_000),
    "a mean that is NaN": lambda card: json.dumps({**card, "preprocessing": {"mean": [0.0, float("nan"), 0.0]}}),
    "a mean of 400 digits": lambda card: json.dumps({**card, "preprocessing": {"mean": [0.0, 10**400, 0.0]}}),
    "a mean of truths": lambda card: json.dumps({**card, "preprocessing": {"mean": [True, True, True]}}),
    "a crop that is true": lambda card: json.dumps({**card, "preprocessing": {"crop_size": True}}),
    "names for others": lambda card: json.dumps({**card, "class_names": ["one"]}),
    "a field too many": lambda card: json.dumps({**card, "command": "rm"}),
    "a field too few": lambda card: json.dumps({k: v for k, v in card.items() if k != "arch"}),
    "a huge crop": lambda card: json.dumps({**card, "preprocessing": {**card["preprocessing"], "crop_size": 10**9}}),
    "an unknown interpolation": lambda card: json.dumps({**card, "preprocessing": {"interpolation": "lanczos"}}),
    "interpolations": lambda card: json.dumps({**card, "preprocessing": {"interpolation": ["bilinear", "bicubic"]}}),
    "a mean of words": lambda card: json.dumps({**card, "preprocessing": {**card["preprocessing"], "mean": "abc"}}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_card_is_refused(ported: Path, tmp_path: Path, damage: str) -> None:
    card = json.loads((ported / "model.json").read_text())
    (tmp_path / "model.json").write_text(DAMAGE[damage](card))
    with pytest.raises(UserError, match="is not a model card") as error:
        weights.ModelCard.load(tmp_path)
    assert len(str(error.value)) < 500


def test_a_card_of_an_earlier_version_has_todays_defaults(ported: Path, tmp_path: Path) -> None:
    card = json.loads((ported / "model.json").read_text())
    del card["class_order"]
    (tmp_path / "model.json").write_text(json.dumps(card))
    assert weights.ModelCard.load(tmp_path) == weights.ModelCard.load(ported)
    assert weights.ModelCard.load(tmp_path).class_order == "text"


def test_weights_of_another_arch_than_the_card_says_are_refused(ported: Path, tmp_path: Path) -> None:
    card = json.loads((ported / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**card, "arch": "resnet34"}))
    (tmp_path / "weights").symlink_to(ported / "weights")
    with pytest.raises(UserError, match="can't be read"):
        weights.load(tmp_path)
