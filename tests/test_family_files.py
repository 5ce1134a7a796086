"""What files of some families hold besides, or call otherwise, and variables of another image size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from torchvision.models import list_models
from torchvision.models.vision_transformer import interpolate_embeddings

from convert import __main__ as convert_command
from convert import checkpoints, names
from jaxsft import config as config_module
from jaxsft.cli import UserError
from jaxsft.models import densenet, vision_transformer
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.models.family import variable_shapes
from jaxsft.models.initial import initial
from jaxsft.models.weights import ModelCard, Preprocessing, shapes
from jaxsft.parity import networks, oracle
from tests.narrow import SIDE, torch_narrow_vit

CLASSES = 5


def tensors(arch: str) -> dict[str, np.ndarray]:
    return oracle.state(networks.build(arch, CLASSES))


@pytest.mark.parametrize("arch", ["narrow_swin", "narrow_swin_v2"])
def test_constants_are_checked_and_made_anew(arch: str) -> None:
    before = tensors(arch)
    variables = variable_shapes(ARCHITECTURES[arch](num_classes=CLASSES), SIDE)
    constants = family_of(arch).constants(arch)
    assert len(constants) == 4 * (1 + arch.endswith("v2"))  # a block has its own
    assert not [path for path in names.flatten(variables) if "relative_position_index" in path]
    after = names.to_torch(names.to_flax(before, variables, arch), arch)
    for name in constants:
        assert (after[name].dtype, after[name].tobytes()) == (before[name].dtype, before[name].tobytes()), name
    for name, constant in constants.items():
        with pytest.raises(UserError, match=re.escape(f"{name} {constant.shape}, which holds other values")):
            names.to_flax({**before, name: constant + 1}, variables, arch)
        with pytest.raises(UserError, match=re.escape(f"missing: {name};")):
            names.to_flax({k: v for k, v in before.items() if k != name}, variables, arch)


# A family, and what its old files say for the names of today: torchvision maps them in the same way.
OLD = (
    ("narrow_densenet", densenet, r"(denselayer\d\.(?:norm|conv))([12])\.", r"\1.\2."),
    ("narrow_vit", vision_transformer, r"mlp\.0\.", "mlp.linear_1."),
    ("narrow_vit", vision_transformer, r"mlp\.3\.", "mlp.linear_2."),
)


@pytest.mark.parametrize(("arch", "family", "today", "then"), OLD)
def test_old_files_are_read(arch: str, family: Any, today: str, then: str, tmp_path: Path) -> None:
    before = tensors(arch) if arch != "narrow_vit" else oracle.state(networks.build(arch, CLASSES, image_size=SIDE))
    old = {re.sub(today, then, name): np.ascontiguousarray(value) for name, value in before.items()}
    assert old.keys() != before.keys()
    safetensors.numpy.save_file(old, tmp_path / "old.safetensors")
    found, card = checkpoints.read(str(tmp_path / "old.safetensors"), arch)
    assert card.num_classes == CLASSES
    assert found.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(("old", "new"), [(4, 9), (14, 6), (3, 1), (1, 4)])
def test_a_position_embedding_is_resized_as_in_torchvision(old: int, new: int) -> None:
    embedding = np.random.default_rng(0).standard_normal((1, 1 + old**2, 6))
    state = {"encoder.pos_embedding": torch.from_numpy(embedding)}
    expected = interpolate_embeddings(8 * new, 8, dict(state))["encoder.pos_embedding"].numpy()
    kernel = np.zeros((8, 8, 3, 6))
    before = {"params": {"conv_proj": {"kernel": kernel}, "encoder": {"pos_embedding": embedding}}}
    with jax.enable_x64(True):
        after = vision_transformer.resized(before, 8 * new)["params"]["encoder"]["pos_embedding"]
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-13)  # float64 roundings of sums of 16
    assert before["params"]["encoder"]["pos_embedding"] is embedding


def test_weights_for_another_image_size_are_taken(tmp_path: Path) -> None:
    """A file says its own size; training at another one resizes; where patches don't fit it is refused."""
    safetensors.numpy.save_file(
        oracle.state(networks.build("narrow_vit", CLASSES, image_size=SIDE)), tmp_path / "vit.safetensors"
    )
    found, card = checkpoints.read(str(tmp_path / "vit.safetensors"), "narrow_vit")
    assert card.preprocessing == Preprocessing(SIDE, SIDE)
    variables = names.to_flax(found, shapes(card), "narrow_vit")

    config = config_module.default()
    config.model.arch, config.model.weights = "narrow_vit", "some"
    for side, tokens in ((SIDE, 17), (48, 37)):
        config.data.image_size = side
        model, values, *_ = initial(config, tuple("abc"), lambda *_: (variables, card))
        assert values["params"]["encoder"]["pos_embedding"].shape[1] == tokens
        assert jax.tree.map(np.shape, values) == jax.tree.map(lambda s: s.shape, variable_shapes(model, side))
    config.data.image_size = 60
    with pytest.raises(UserError, match="config.data.image_size is 60; it must be a multiple of 8"):
        initial(config, tuple("abc"), lambda *_: (variables, card))


def test_every_preset_of_torchvision_is_one_of_ours() -> None:
    """Of all weights with classes, whose card can be written; vgg16's features are none."""
    count = 0
    for arch in [arch for arch in ARCHITECTURES if arch in list_models()]:
        for name, entry in checkpoints.registry(arch).items():
            preset = entry.transforms()
            found = checkpoints.preprocessing_of(preset, name)
            assert found.interpolation == preset.interpolation.value
            classes = tuple(entry.meta["categories"])
            ModelCard(arch, len(classes), classes, preprocessing=found).check()
            count += 1
    assert count > 100
    assert set(checkpoints.registry("vgg16")) == {"IMAGENET1K_V1", "DEFAULT"}
    with pytest.raises(UserError, match="vgg16 has no weights 'IMAGENET1K_FEATURES'"):
        checkpoints.read("IMAGENET1K_FEATURES", "vgg16")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_network_that_drops_is_verified_without(
    fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """At its own image size, in training too: torch's dropout is off there, as is ours. Logits of 0 are equal, too."""
    torch_model = torch_narrow_vit(CLASSES)
    if not fresh:  # a fresh head is all zeros
        networks.stir(torch_model)
    assert torch_model.encoder.dropout.p > 0
    path = tmp_path / "vit.safetensors"
    safetensors.numpy.save_file(oracle.state(torch_model), path)
    monkeypatch.setattr(
        convert_command, "torchvision_model", lambda arch, num_classes, side: torch_narrow_vit(num_classes)
    )
    convert_command.to_flax(str(path), "narrow_vit", tmp_path / "ported")
    assert convert_command.verify(tmp_path / "ported", str(path)) == 0, capsys.readouterr().out
    with pytest.raises(UserError, match=f"--image-size is 64; these weights of narrow_vit are for {SIDE} px"):
        convert_command.verify(tmp_path / "ported", str(path), image_size=64)
