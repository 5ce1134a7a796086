"""The table of names: complete for every architecture, strict, and the same in both directions."""

from __future__ import annotations

import numpy as np
import pytest

from convert import names
from jaxsft.cli import UserError
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.models.family import variable_shapes
from tests.oracle import ALL, ONE_EACH, ported, tensors, torch_model, unfilled


def check_covers_every_torchvision_tensor(arch: str) -> None:
    expected = {name: tuple(value.shape) for name, value in unfilled(arch).state_dict().items()}
    found = {}
    for path, leaf in names.flatten(variable_shapes(ARCHITECTURES[arch]())).items():
        name, transform = names.torch_tensor(path, leaf.ndim, arch)
        assert name not in found, f"{name} would be filled twice"
        found[name] = leaf.shape if transform.to_torch is None else tuple(leaf.shape[a] for a in transform.to_torch)
    constants = {name: value.shape for name, value in family_of(arch).constants(arch).items()}
    assert not found.keys() & constants.keys()
    assert found | constants == expected


@pytest.mark.parametrize("arch", ONE_EACH)
def test_covers_every_torchvision_tensor(arch: str) -> None:
    check_covers_every_torchvision_tensor(arch)


@pytest.mark.full
@pytest.mark.parametrize("arch", sorted({*ALL} - {*ONE_EACH}))
def test_covers_every_torchvision_tensor_of_all(arch: str) -> None:
    check_covers_every_torchvision_tensor(arch)


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_round_trip_is_bit_equal(arch: str) -> None:
    before = tensors(torch_model(arch))
    _, variables = ported(torch_model(arch), arch)
    after = names.to_torch(variables, arch)
    assert after.keys() == before.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype, name
        assert after[name].shape == array.shape, name
        assert after[name].tobytes() == array.tobytes(), name


def test_one_message_names_everything_that_does_not_fit() -> None:
    weights = tensors(torch_model("resnet18"))
    del weights["layer1.0.conv1.weight"], weights["bn1.bias"]
    weights["extra.weight"] = np.zeros(3, np.float32)
    weights["layer2.0.conv1.weight"] = weights["layer2.0.conv1.weight"][:, :5]
    with pytest.raises(UserError) as error:
        names.to_flax(weights, variable_shapes(ARCHITECTURES["resnet18"](num_classes=10)), "resnet18")
    message = str(error.value)
    assert "missing: bn1.bias, layer1.0.conv1.weight" in message
    assert "unused: extra.weight" in message
    assert "misshapen: layer2.0.conv1.weight (128, 5, 3, 3), expected (128, 64, 3, 3)" in message


def test_a_square_kernel_is_not_mistaken_for_its_transpose() -> None:
    # fc with as many classes as features fits either way round: only the values tell.
    model = torch_model("resnet18", num_classes=512)
    _, variables = ported(model, "resnet18", num_classes=512)
    np.testing.assert_array_equal(variables["params"]["fc"]["kernel"], model.fc.weight.detach().numpy().T)


def test_files_older_than_the_counter_are_read() -> None:
    weights = {k: v for k, v in tensors(torch_model("resnet18")).items() if not k.endswith(names.OPTIONAL_LEAF)}
    variables = names.to_flax(weights, variable_shapes(ARCHITECTURES["resnet18"](num_classes=10)), "resnet18")
    assert variables["batch_stats"]["bn1"]["count"] == 0
